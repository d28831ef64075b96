{{/* The template of a worker's pod, for Deployment and StatefulSet. */}}
{{- define "inferstream.podTemplate" -}}
metadata:
  labels:
    {{- include "inferstream.selectorLabels" . | nindent 4 }}
    {{- with mergeOverwrite (deepCopy .Values.commonLabels) .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: inferstream
    # Settings are read once, at start: a change of them has to make new pods.
    checksum/config: {{ include "inferstream.config" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "inferstream.serviceAccountName" . }}
  automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
  # Variables of the namespace's Services, INFERSTREAM_PORT among them, are nothing that the service wants.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ default (include "inferstream.gracePeriod" .) .Values.workload.terminationGracePeriodSeconds }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.podSecurityContext }}
  securityContext: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and .Values.gpu.enabled .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ .Values.gpu.runtimeClassName }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "inferstream.tolerations" . }}
  tolerations: {{- . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity: {{- tpl (toYaml .) $ | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints: {{- include "inferstream.spread" . | nindent 4 }}
  {{- end }}
  {{- with .Values.resourceClaims }}
  resourceClaims: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.hostAliases }}
  hostAliases: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.dnsPolicy }}
  dnsPolicy: {{ . }}
  {{- end }}
  {{- with .Values.dnsConfig }}
  dnsConfig: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.model.download.source .Values.extraInitContainers }}
  initContainers:
    {{- if .Values.model.download.source }}
    {{- include "inferstream.downloadContainer" . | nindent 4 }}
    {{- end }}
    {{- with .Values.extraInitContainers }}
    {{- tpl (toYaml .) $ | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: inferstream
      {{- include "inferstream.container" . | nindent 6 }}
      {{- with .Values.image.command }}
      command: {{- toYaml . | nindent 8 }}
      {{- end }}
      args: [run, --config, /etc/inferstream/config.yaml]
      env: {{- include "inferstream.env" . | nindent 8 }}
      {{- with .Values.extraEnvFrom }}
      envFrom: {{- tpl (toYaml .) $ | nindent 8 }}
      {{- end }}
      ports:
        - name: metrics
          containerPort: {{ include "inferstream.setting" (list . "telemetry" "port") }}
      {{- include "inferstream.probes" . | trim | nindent 6 }}
      resources: {{- include "inferstream.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "inferstream.configMounts" . | nindent 8 }}
        - name: cache
          mountPath: /cache
        - name: models
          mountPath: {{ .Values.model.storage.mountPath }}
          {{- with .Values.model.storage.subPath }}
          subPath: {{ . }}
          {{- end }}
          {{- if .Values.model.storage.readOnly }}
          readOnly: true
          {{- end }}
        {{- if .Values.shm.enabled }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- tpl (toYaml .) $ | nindent 8 }}
        {{- end }}
    {{- with .Values.extraContainers }}
    {{- tpl (toYaml .) $ | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "inferstream.configVolumes" (list . (include "inferstream.fullname" .)) | trim | nindent 4 }}
    - name: cache
      emptyDir:
        sizeLimit: {{ .Values.scratch.cacheSizeLimit }}
    {{- with include "inferstream.modelVolume" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- if .Values.shm.enabled }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.shm.sizeLimit }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- tpl (toYaml .) $ | nindent 4 }}
    {{- end }}
{{- end }}

{{/*
The three probes.  A worker is no server: no request is lost when it is not ready, and what a probe must find out is
whether a restart, which loads the model anew and moves partitions twice, would make anything better.

/startupz  200 once the model is warm.  It never depends on Kafka: a broker that is away must not eat the time for loading.
/livez     fails only for what a restart cures: the event loop stands still, a batch hangs on the device, a main task is
           dead.  Brokers that are away, lag, a rebalance and a worker without partitions are none of these.
/readyz    200 from warm to draining.  Having no partition counts as ready: a standby, or the first pod of a rollout while
           the others hold all partitions, would else block the rollout for ever.
*/}}
{{- define "inferstream.probes" -}}
{{- range $probe, $path := dict "startup" "/startupz" "liveness" "/livez" "readiness" "/readyz" }}
{{- with index $.Values.probes $probe }}
{{ $probe }}Probe:
  httpGet:
    path: {{ $path }}
    port: metrics
  periodSeconds: {{ .periodSeconds }}
  failureThreshold: {{ .failureThreshold }}
  timeoutSeconds: {{ .timeoutSeconds }}
{{- end }}
{{- end }}
{{- end }}

{{/* The worker's environment. What refers to another variable stands behind all of those that it may refer to. */}}
{{- define "inferstream.env" -}}
{{- $extra := include "inferstream.extraEnv" . | fromJsonArray }}
{{- include "inferstream.mergedEnv" (list (include "inferstream.ownEnv" .) $extra) }}
{{- $transactional := "INFERSTREAM_KAFKA__TRANSACTIONAL_ID" }}
{{- $isExactlyOnce := eq (include "inferstream.setting" (list . "delivery" "guarantee")) "exactly-once" }}
{{- if and (eq .Values.workload.kind "StatefulSet") $isExactlyOnce (not (has $transactional (include "inferstream.extraEnvNames" . | fromJsonArray))) }}
# The same after a restart, so that what the predecessor left open is aborted at once.
- name: {{ $transactional }}
  value: {{ printf "%s-$(INFERSTREAM_KAFKA__GROUP_INSTANCE_ID)" (include "inferstream.setting" (list . "kafka" "group_id")) | quote }}
{{- end }}
{{- end }}

{{/* The root file system is read-only and the user may be any: everything that is written has its place here.
USER is there as torch asks for the user's name, and an arbitrary id has none. */}}
{{- define "inferstream.ownEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: inferstream
- name: XDG_CACHE_HOME
  value: /cache
- name: TORCHINDUCTOR_CACHE_DIR
  value: /cache/torchinductor
- name: TRITON_CACHE_DIR
  value: /cache/triton
- name: HF_HOME
  value: {{ .Values.model.storage.mountPath }}/huggingface
{{- if .Values.model.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
- name: TRANSFORMERS_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.model.hubEndpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.secrets.hub }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .tokenKey }}
{{- end }}
{{- end }}
{{- if eq .Values.workload.kind "StatefulSet" }}
- name: INFERSTREAM_KAFKA__GROUP_INSTANCE_ID
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- end }}
{{- with include "inferstream.kafkaEnv" . }}
{{ trim . }}
{{- end }}
{{- end }}

{{- define "inferstream.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- with .Values.gpu }}
{{- if .enabled }}
{{- range $kind := list "limits" "requests" }}
{{- $given := dig $kind $.Values.gpu.resourceName "" $resources | toString }}
{{- if not (has $given (list "" ($.Values.gpu.count | toString))) }}
{{- fail (printf "\n\nresources.%s names %s %s, and gpu.count is %v: set gpu.count, and leave the GPU out of resources.\n" $kind $given $.Values.gpu.resourceName $.Values.gpu.count) }}
{{- end }}
{{- end }}
{{- $gpus := dict .resourceName .count }}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpus "requests" $gpus) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "inferstream.tolerations" -}}
{{- $tolerations := .Values.tolerations }}
{{- if and .Values.gpu.enabled .Values.gpu.tolerateTaint }}
{{- $tolerations = append $tolerations (dict "key" .Values.gpu.resourceName "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- if $tolerations }}
{{- toYaml $tolerations }}
{{- end }}
{{- end }}

{{- define "inferstream.spread" -}}
{{- $selector := dict "labelSelector" (dict "matchLabels" (include "inferstream.selectorLabels" . | fromYaml)) }}
{{- $constraints := list }}
{{- range .Values.topologySpreadConstraints }}
{{- $constraints = append $constraints (ternary . (merge (omit . "labelSelector") $selector) (not (empty .labelSelector))) }}
{{- end }}
{{- tpl (toYaml $constraints) . }}
{{- end }}

{{/* Copies the model to the folder that config.model.id names.  rclone writes beside the file and renames, so that pods
that share a volume do not disturb each other, and leaves alone what is there already. */}}
{{- define "inferstream.downloadContainer" -}}
{{- with .Values.model.download -}}
- name: download-model
  image: {{ .image | quote }}
  imagePullPolicy: {{ .pullPolicy }}
  terminationMessagePolicy: FallbackToLogsOnError
  {{- with $.Values.securityContext }}
  securityContext: {{- toYaml . | nindent 4 }}
  {{- end }}
  command: [rclone]
  args:
    - copy
    - {{ .source | quote }}
    - {{ include "inferstream.setting" (list $ "model" "id") | quote }}
    - --verbose
    - --stats=30s
    - --stats-one-line
    {{- range .extraArgs }}
    - {{ . | quote }}
    {{- end }}
  env: {{- include "inferstream.mergedEnv" (list "[{name: HOME, value: /tmp}, {name: RCLONE_CONFIG, value: /tmp/rclone.conf}]" .env) | nindent 4 }}
  {{- with .envFrom }}
  envFrom: {{- toYaml . | nindent 4 }}
  {{- end }}
  resources: {{- toYaml .resources | nindent 4 }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: models
      mountPath: {{ $.Values.model.storage.mountPath }}
      {{- with $.Values.model.storage.subPath }}
      subPath: {{ . }}
      {{- end }}
{{- end }}
{{- end }}

{{/* Nothing for a StatefulSet's own claims: those come from its volumeClaimTemplates. */}}
{{- define "inferstream.modelVolume" -}}
{{- with .Values.model.storage }}
{{- if eq .kind "emptyDir" }}
- name: models
  emptyDir:
    sizeLimit: {{ .sizeLimit }}
{{- else if eq .kind "existingClaim" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
    {{- if and .readOnly (not $.Values.model.download.source) }}
    readOnly: true
    {{- end }}
{{- else if eq $.Values.workload.kind "Deployment" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "inferstream.fullname" $ }}-models
{{- end }}
{{- end }}
{{- end }}

{{- define "inferstream.claimSpec" -}}
accessModes: {{- toYaml .accessModes | nindent 2 }}
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end }}
