{{/*
Refuses what values.schema.json cannot, all at once, a sentence each: what it is about, why, what to do.
*/}}
{{- define "inferstream.validate" -}}
{{- $problems := concat
  (include "inferstream.validateImage" . | fromJsonArray)
  (include "inferstream.validateConfig" . | fromJsonArray)
  (include "inferstream.validateSecrets" . | fromJsonArray)
  (include "inferstream.validateModel" . | fromJsonArray)
  (include "inferstream.validateWorkload" . | fromJsonArray)
  (include "inferstream.validateScaling" . | fromJsonArray)
}}
{{- if $problems }}
{{- fail (printf "\n\n%s\n" (join "\n" $problems)) }}
{{- end }}
{{- end }}

{{- define "inferstream.validateImage" -}}
{{- $problems := list }}
{{- if not .Values.image.repository }}
{{- $problems = append $problems (printf `image.repository is empty: no image is published, so name yours.
  Build and push it:     make image IMAGE=registry.example.com/inferstream:%[1]s && docker push registry.example.com/inferstream:%[1]s
                         helm … --set image.repository=registry.example.com/inferstream
  Or load it into kind:  make image IMAGE=inferstream:%[1]s && kind load docker-image inferstream:%[1]s
  or into k3d:           make image IMAGE=inferstream:%[1]s && k3d image import inferstream:%[1]s
                         helm … --set image.repository=inferstream` .Chart.AppVersion) }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateConfig" -}}
{{- $problems := list }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- range $setting, $variable := dict
  "kafka.bootstrap_servers" "INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS"
  "input.topics" "INFERSTREAM_INPUT__TOPICS"
  "output.topic" "INFERSTREAM_OUTPUT__TOPIC" }}
{{- $value := include "inferstream.setting" (prepend (splitList "." $setting) $) }}
{{- if and (has $value (list "" "[]")) (not (has $variable $given)) }}
{{- $problems = append $problems (printf "config.%s is required, here or as %s in extraEnv." $setting $variable) }}
{{- end }}
{{- end }}
{{- if dig "security" "password" "" (default dict .Values.config.kafka) }}
{{- $problems = append $problems "config.kafka.security.password is a secret, and values and ConfigMaps are read by many: put it into a Secret and name that in secrets.kafka.sasl.existingSecret." }}
{{- end }}
{{- if dig "group_instance_id" "" (default dict .Values.config.kafka) }}
{{- $problems = append $problems "config.kafka.group_instance_id would be the same in every pod, and of two members with one id one is thrown out: set workload.kind to StatefulSet, which gives each pod its own name." }}
{{- end }}
{{- if dig "transactional_id" "" (default dict .Values.config.kafka) }}
{{- $problems = append $problems "config.kafka.transactional_id would be the same in every pod, and each would fence the others: leave it out; workload.kind StatefulSet gives each pod a stable one." }}
{{- end }}
{{- range $setting, $variable := dict
  "delivery.drain_timeout_s" "INFERSTREAM_DELIVERY__DRAIN_TIMEOUT_S"
  "telemetry.host" "INFERSTREAM_TELEMETRY__HOST"
  "telemetry.port" "INFERSTREAM_TELEMETRY__PORT" }}
{{- if has $variable $given }}
{{- $problems = append $problems (printf "%s in extraEnv would not be what the pod's grace period, port and probes are made of: set config.%s." $variable $setting) }}
{{- end }}
{{- end }}
{{- $port := include "inferstream.setting" (list . "telemetry" "port") }}
{{- if has $port (list "" "0") }}
{{- $problems = append $problems "config.telemetry.port must not be 0 or empty: the probes need it." }}
{{- end }}
{{- $host := include "inferstream.setting" (list . "telemetry" "host") }}
{{- if or (not $host) (eq $host "localhost") (eq $host "::1") (hasPrefix "127." $host) }}
{{- $problems = append $problems (printf "config.telemetry.host %q cannot be reached by the kubelet's probes and by Prometheus: use 0.0.0.0, or :: for IPv6." $host) }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateSecrets" -}}
{{- $problems := list }}
{{- $protocol := include "inferstream.protocol" . }}
{{- $security := dig "security" dict (default dict .Values.config.kafka) | default dict }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- $encrypted := has $protocol (list "SSL" "SASL_SSL") }}
{{- with .Values.secrets.kafka }}
{{- if hasPrefix "SASL_" $protocol }}
{{- if not (or (dig "mechanism" "" $security) (has "INFERSTREAM_KAFKA__SECURITY__MECHANISM" $given)) }}
{{- $problems = append $problems (printf "config.kafka.security.mechanism is required with protocol %s: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512." $protocol) }}
{{- end }}
{{- if not (or (eq (dig "mechanism" "" $security | default "" | toString) "OAUTHBEARER") (dig "username" "" $security) (and .sasl.existingSecret .sasl.usernameKey) (has "INFERSTREAM_KAFKA__SECURITY__USERNAME" $given)) }}
{{- $problems = append $problems (printf "config.kafka.security.username is required with protocol %s, there or by secrets.kafka.sasl.usernameKey." $protocol) }}
{{- end }}
{{- if not (or (eq (dig "mechanism" "" $security | default "" | toString) "OAUTHBEARER") .sasl.existingSecret (dig "password_file" "" $security) (has "INFERSTREAM_KAFKA__SECURITY__PASSWORD" $given)) }}
{{- $problems = append $problems (printf "secrets.kafka.sasl.existingSecret is required with protocol %s: the name of a Secret with the password." $protocol) }}
{{- end }}
{{- else if .sasl.existingSecret }}
{{- $problems = append $problems (printf "secrets.kafka.sasl.existingSecret has no use with config.kafka.security.protocol %s: set it to SASL_SSL, or SASL_PLAINTEXT." $protocol) }}
{{- end }}
{{- if and .sasl.usernameKey (not .sasl.existingSecret) }}
{{- $problems = append $problems "secrets.kafka.sasl.usernameKey is a key of secrets.kafka.sasl.existingSecret, which is empty." }}
{{- end }}
{{- if and .sasl.existingSecret .sasl.usernameKey (dig "username" "" $security) }}
{{- $problems = append $problems "config.kafka.security.username and secrets.kafka.sasl.usernameKey both name the user: use one." }}
{{- end }}
{{- if and .ca.existingSecret .ca.existingConfigMap }}
{{- $problems = append $problems "secrets.kafka.ca.existingSecret and existingConfigMap both hold the authorities: use one." }}
{{- end }}
{{- range $what, $name := dict "ca.existingSecret" .ca.existingSecret "ca.existingConfigMap" .ca.existingConfigMap "client.existingSecret" .client.existingSecret }}
{{- if and $name (not $encrypted) }}
{{- $problems = append $problems (printf "secrets.kafka.%s has no use with config.kafka.security.protocol %s: set it to SSL or SASL_SSL." $what $protocol) }}
{{- end }}
{{- end }}
{{- range $file, $name := dict "password_file" .sasl.existingSecret "ca_file" (or .ca.existingSecret .ca.existingConfigMap) "cert_file" .client.existingSecret "key_file" .client.existingSecret "key_password_file" (and .client.existingSecret .client.keyPasswordKey) }}
{{- if and $name (dig $file "" $security) }}
{{- $problems = append $problems (printf "config.kafka.security.%s is set by the chart for what secrets.kafka names: leave out one of the two." $file) }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateModel" -}}
{{- $problems := list }}
{{- $id := include "inferstream.setting" (list . "model" "id") }}
{{- $isLocal := or (hasPrefix "/" $id) (hasPrefix "package:" $id) (hasPrefix "builtin:" $id) }}
{{- with .Values.model }}
{{- if and (eq .storage.kind "existingClaim") (not .storage.existingClaim) }}
{{- $problems = append $problems "model.storage.existingClaim is required with model.storage.kind existingClaim: the name of a PersistentVolumeClaim in the release's namespace." }}
{{- end }}
{{- if and (ne .storage.kind "existingClaim") .storage.existingClaim }}
{{- $problems = append $problems (printf "model.storage.existingClaim has no use with model.storage.kind %s: set kind to existingClaim." .storage.kind) }}
{{- end }}
{{- if and .storage.readOnly (ne .storage.kind "existingClaim") (not .download.source) }}
{{- $problems = append $problems (printf "model.storage.readOnly with model.storage.kind %s would be an empty folder for ever: use an existing claim, or model.download." .storage.kind) }}
{{- end }}
{{- if and .storage.readOnly (not $isLocal) (not .offline) }}
{{- $problems = append $problems "model.storage.readOnly leaves no place for a download: set model.offline with the model in the claim, or config.model.id to a folder." }}
{{- end }}
{{- if and .offline (not $isLocal) (eq .storage.kind "emptyDir") }}
{{- $problems = append $problems (printf "model.offline finds no model %q in an empty model.storage: use a claim that has it, or set config.model.id to a folder of the image or to package:NAME." (default "of the default config.model.id" $id)) }}
{{- end }}
{{- if and .offline $.Values.secrets.hub.existingSecret }}
{{- $problems = append $problems "secrets.hub.existingSecret has no use with model.offline, which asks no hub." }}
{{- end }}
{{- if and .download.source (not (hasPrefix (printf "%s/" .storage.mountPath) $id)) }}
{{- $problems = append $problems (printf "config.model.id must be the folder that model.download fills, below model.storage.mountPath: %s/NAME." .storage.mountPath) }}
{{- end }}
{{- end }}
{{- $device := default "auto" (include "inferstream.setting" (list . "model" "device")) }}
{{- if and .Values.gpu.enabled (eq $device "cpu") }}
{{- $problems = append $problems "config.model.device is cpu, and gpu.enabled would keep a GPU from others: leave out one of the two." }}
{{- end }}
{{- if and (hasPrefix "cuda" $device) (not .Values.gpu.enabled) (not .Values.resourceClaims) }}
{{- $extended := "" }}
{{- range $name, $_ := dig "limits" dict .Values.resources }}
{{- if contains "/" $name }}
{{- $extended = $name }}
{{- end }}
{{- end }}
{{- if not $extended }}
{{- $problems = append $problems (printf "config.model.device is %s, and the pods ask for no GPU: set gpu.enabled." $device) }}
{{- end }}
{{- end }}
{{- if and .Values.gpu.runtimeClassName (not .Values.gpu.enabled) }}
{{- $problems = append $problems "gpu.runtimeClassName has no use without gpu.enabled." }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateWorkload" -}}
{{- $problems := list }}
{{- $least := include "inferstream.gracePeriod" . | int }}
{{- with .Values.workload.terminationGracePeriodSeconds }}
{{- if lt (int .) $least }}
{{- $problems = append $problems (printf "workload.terminationGracePeriodSeconds %d would cut off a drain: it must be at least config.delivery.drain_timeout_s + 15 = %d. Leave it out, or lower the drain's deadline." (int .) $least) }}
{{- end }}
{{- end }}
{{- range $name, $request := dig "requests" dict .Values.resources }}
{{- $limit := dig "limits" $name "" $.Values.resources }}
{{- if and $limit $request }}
{{- if gt (include "inferstream.quantity" $request | float64) (include "inferstream.quantity" $limit | float64) }}
{{- $problems = append $problems (printf "resources.requests.%s %v is above resources.limits.%s %v (what you leave out is the chart's default): set both." $name $request $name $limit) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled }}
{{- $problems = append $problems "metrics.serviceMonitor.enabled and metrics.podMonitor.enabled would scrape every pod twice: use one." }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.kafkaPorts) (eq (include "inferstream.bootstrapServers" .) "[]") }}
{{- $problems = append $problems "networkPolicy.kafkaPorts is required where config.kafka.bootstrap_servers does not name the brokers." }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateScaling" -}}
{{- $problems := list }}
{{- if and .Values.keda.enabled .Values.autoscaling.enabled }}
{{- $problems = append $problems "keda.enabled and autoscaling.enabled would both set the number of pods: use one." }}
{{- end }}
{{- range $scaler := list "keda" "autoscaling" }}
{{- if and (get (get $.Values $scaler) "enabled") (eq $.Values.workload.kind "StatefulSet") }}
{{- $problems = append $problems (printf "%s.enabled cannot be had with workload.kind StatefulSet: a static member that is scaled down keeps its partitions, unread, for a whole session timeout. Use a Deployment." $scaler) }}
{{- end }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if .enabled }}
{{- if not .maxReplicas }}
{{- $problems = append $problems "autoscaling.maxReplicas is required: the number of partitions of the input topics, as more pods than that stand by idle." }}
{{- else if gt (int .minReplicas) (int .maxReplicas) }}
{{- $problems = append $problems (printf "autoscaling.minReplicas %d must not be above autoscaling.maxReplicas %d." (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- if not .metrics }}
{{- $problems = append $problems "autoscaling.metrics is required: CPU says nothing of a backlog; take the lag from a metrics adapter, or use keda.enabled." }}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.keda.enabled }}
{{- with .Values.keda }}
{{- if not .maxReplicaCount }}
{{- $problems = append $problems "keda.maxReplicaCount is required: the number of partitions of the input topics, as more pods than that stand by idle." }}
{{- else if gt (int .minReplicaCount) (int .maxReplicaCount) }}
{{- $problems = append $problems (printf "keda.minReplicaCount %d must not be above keda.maxReplicaCount %d." (int .minReplicaCount) (int .maxReplicaCount)) }}
{{- end }}
{{- if and (not (kindIs "invalid" .idleReplicaCount)) (ge (int .idleReplicaCount) (int .minReplicaCount)) }}
{{- $problems = append $problems (printf "keda.idleReplicaCount %d must be below keda.minReplicaCount %d." (int .idleReplicaCount) (int .minReplicaCount)) }}
{{- end }}
{{- end }}
{{- if eq (include "inferstream.inputTopics" .) "[]" }}
{{- $problems = append $problems "keda.enabled needs config.input.topics: a trigger is made of each." }}
{{- end }}
{{- if and (not .Values.keda.kafka.bootstrapServers) (has (include "inferstream.bootstrapServers" .) (list "[]" "[\"embedded\"]")) }}
{{- $problems = append $problems "keda.kafka.bootstrapServers is required where config.kafka.bootstrap_servers names no brokers." }}
{{- end }}
{{- $protocol := include "inferstream.protocol" . }}
{{- $security := dig "security" dict (default dict .Values.config.kafka) | default dict }}
{{- if and (or $security.ca_file $security.cert_file) (not .Values.keda.authenticationRef) }}
{{- $problems = append $problems "config.kafka.security.ca_file and cert_file are files in the worker's pod, which KEDA cannot read: use secrets.kafka, or keda.authenticationRef." }}
{{- end }}
{{- if and (hasPrefix "SASL_" $protocol) (not .Values.keda.authenticationRef) }}
{{- if not (include "inferstream.kedaSasl" .) }}
{{- $problems = append $problems (printf "keda.enabled cannot be had with config.kafka.security.mechanism %s unless keda.authenticationRef says how." (include "inferstream.setting" (list . "kafka" "security" "mechanism"))) }}
{{- else if not (or $security.username .Values.secrets.kafka.sasl.usernameKey) }}
{{- $problems = append $problems "config.kafka.security.username, secrets.kafka.sasl.usernameKey or keda.authenticationRef is required with keda.enabled: KEDA does not see extraEnv." }}
{{- else if not .Values.secrets.kafka.sasl.existingSecret }}
{{- $problems = append $problems "secrets.kafka.sasl.existingSecret, or keda.authenticationRef, is required with keda.enabled: KEDA takes passwords only by reference." }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* A resource quantity as a number: "250m" is 0.25, "4Gi" 4294967296. */}}
{{- define "inferstream.quantity" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 }}
{{- mulf (regexFind "^[0-9.]+" (toString .) | float64) (get $units (regexFind "[a-zA-Z]*$" (toString .)) | default 1.0) }}
{{- end }}
