{{- define "inferstream.secretsPath" -}}
/etc/inferstream/kafka
{{- end }}

{{/* The service's settings file: `config`, and what follows from the values around it. */}}
{{- define "inferstream.config" -}}
{{- $security := dict }}
{{- $path := include "inferstream.secretsPath" . }}
{{- with .Values.secrets.kafka }}
{{- if .sasl.existingSecret }}
{{- $_ := set $security "password_file" (printf "%s/password" $path) }}
{{- end }}
{{- if or .ca.existingSecret .ca.existingConfigMap }}
{{- $_ := set $security "ca_file" (printf "%s/ca.crt" $path) }}
{{- end }}
{{- if .client.existingSecret }}
{{- $_ := set $security "cert_file" (printf "%s/tls.crt" $path) }}
{{- $_ := set $security "key_file" (printf "%s/tls.key" $path) }}
{{- if .client.keyPasswordKey }}
{{- $_ := set $security "key_password_file" (printf "%s/key-password" $path) }}
{{- end }}
{{- end }}
{{- end }}
{{- $derived := dict }}
{{- if $security }}
{{- $_ := set $derived "kafka" (dict "security" $security) }}
{{- end }}
{{- if and .Values.gpu.enabled (not (dig "device" "" (default dict .Values.config.model))) }}
{{- $_ := set $derived "model" (dict "device" "cuda") }}
{{- end }}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $derived) }}
{{- end }}

{{/* A setting of `config` by section and name, empty where it is not there: (list $ "input" "topics"). */}}
{{- define "inferstream.setting" -}}
{{- $root := index . 0 }}
{{- $value := $root.Values.config }}
{{- range rest . }}
{{- $value = ternary (get (default dict $value) .) "" (hasKey (default dict $value) .) }}
{{- end }}
{{- if not (kindIs "invalid" $value) }}
{{- $value }}
{{- end }}
{{- end }}

{{- define "inferstream.inputTopics" -}}
{{- include "inferstream.list" (dig "topics" "" (default dict .Values.config.input)) }}
{{- end }}

{{- define "inferstream.bootstrapServers" -}}
{{- include "inferstream.list" (dig "bootstrap_servers" "" (default dict .Values.config.kafka)) }}
{{- end }}

{{/* The drain's deadline, and 15 s for what follows it: leaving the group, the last commit, the interpreter's end. */}}
{{- define "inferstream.gracePeriod" -}}
{{- add (ceil (dig "drain_timeout_s" 30 (default dict .Values.config.delivery)) | int) 15 }}
{{- end }}

{{/* Settings that come from a Secret and are no files. */}}
{{- define "inferstream.kafkaEnv" -}}
{{- with .Values.secrets.kafka.sasl }}
{{- if and .existingSecret .usernameKey }}
- name: INFERSTREAM_KAFKA__SECURITY__USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .usernameKey }}
{{- end }}
{{- end }}
{{- end }}

{{/* One volume of all the files that reach the brokers. A key that is missing holds the pod back with an event. */}}
{{- define "inferstream.kafkaSources" -}}
{{- with .Values.secrets.kafka }}
{{- with .sasl }}
{{- if .existingSecret }}
- secret:
    name: {{ .existingSecret }}
    items:
      - key: {{ .passwordKey }}
        path: password
{{- end }}
{{- end }}
{{- with .ca }}
{{- if .existingSecret }}
- secret:
    name: {{ .existingSecret }}
    items:
      - key: {{ .key }}
        path: ca.crt
{{- else if .existingConfigMap }}
- configMap:
    name: {{ .existingConfigMap }}
    items:
      - key: {{ .key }}
        path: ca.crt
{{- end }}
{{- end }}
{{- with .client }}
{{- if .existingSecret }}
- secret:
    name: {{ .existingSecret }}
    items:
      - key: {{ .certKey }}
        path: tls.crt
      - key: {{ .keyKey }}
        path: tls.key
      {{- with .keyPasswordKey }}
      - key: {{ . }}
        path: key-password
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volumes that every pod with the service's settings has: (list $ NAME-OF-THE-CONFIGMAP). */}}
{{- define "inferstream.configVolumes" -}}
{{- $root := index . 0 }}
- name: config
  configMap:
    name: {{ index . 1 }}
- name: tmp
  emptyDir:
    sizeLimit: {{ $root.Values.scratch.tmpSizeLimit }}
{{- with include "inferstream.kafkaSources" $root }}
- name: kafka
  projected:
    # Whatever the user id is that the pod gets.
    defaultMode: 0444
    sources: {{- trim . | nindent 6 }}
{{- end }}
{{- end }}

{{- define "inferstream.configMounts" -}}
# One file and not the folder, which would hide the image's own /etc/inferstream/defaults.yaml.
- name: config
  mountPath: /etc/inferstream/config.yaml
  subPath: config.yaml
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if include "inferstream.kafkaSources" . }}
- name: kafka
  mountPath: {{ include "inferstream.secretsPath" . }}
  readOnly: true
{{- end }}
{{- end }}

{{/* The mounts of a command beside the workers: the settings, and those of the worker's own that are not of its model, its
cache or its shared memory: a CA's file may be among them. */}}
{{- define "inferstream.commandMounts" -}}
{{- include "inferstream.configMounts" . }}
{{- $volumes := tpl (toYaml .Values.extraVolumes) . | fromYamlArray }}
{{- $names := include "inferstream.names" $volumes | fromJsonArray | concat (list "config" "tmp") }}
{{- range tpl (toYaml .Values.extraVolumeMounts) . | fromYamlArray }}
{{- if has .name $names }}
{{ list . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{/* And their volumes: (list $ NAME-OF-THE-CONFIGMAP). */}}
{{- define "inferstream.commandVolumes" -}}
{{- $root := index . 0 }}
{{- include "inferstream.configVolumes" . | trim }}
{{- with $root.Values.extraVolumes }}
{{ tpl (toYaml .) $root }}
{{- end }}
{{- end }}

{{/* A pod that runs one command and ends: where it may run and how it finds the brokers, as the workers do.  The GPU's
taint is tolerated only where nodes are chosen by label: these may all be nodes with GPUs. */}}
{{- define "inferstream.onePodSpec" -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector | empty | ternary (toYaml .Values.tolerations) (include "inferstream.tolerations" .) }}
{{- if ne . "[]" }}
tolerations: {{- . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What every container of the service's image has.  The end of its log says why it ended: config errors are told there. */}}
{{- define "inferstream.container" -}}
image: {{ include "inferstream.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
{{- with .Values.securityContext }}
securityContext: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The environment of commands beside the workers: secrets, and whatever replaces settings. */}}
{{- define "inferstream.commandEnv" -}}
{{- $own := printf "- {name: HOME, value: /tmp}\n%s" (include "inferstream.kafkaEnv" .) -}}
env: {{- include "inferstream.mergedEnv" (list $own (include "inferstream.extraEnv" . | fromJsonArray)) | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom: {{- tpl (toYaml .) $ | nindent 2 }}
{{- end }}
{{- end }}
