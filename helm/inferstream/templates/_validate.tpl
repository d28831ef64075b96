{{/*
Refuses what values.schema.json cannot, all at once, a sentence each: what it is about, why, what to do.
*/}}
{{- define "inferstream.validate" -}}
{{- include "inferstream.refuse" (include "inferstream.validateNulls" . | fromJsonArray) }}
{{- include "inferstream.refuse" (concat
  (include "inferstream.validateImage" . | fromJsonArray)
  (include "inferstream.validateConfig" . | fromJsonArray)
  (include "inferstream.validateTimes" . | fromJsonArray)
  (include "inferstream.validateTopics" . | fromJsonArray)
  (include "inferstream.validateSecurity" . | fromJsonArray)
  (include "inferstream.validateEnvironment" . | fromJsonArray)
  (include "inferstream.validateModel" . | fromJsonArray)
  (include "inferstream.validateLabels" . | fromJsonArray)
  (include "inferstream.validateResources" . | fromJsonArray)
  (include "inferstream.validateVolumes" . | fromJsonArray)
  (include "inferstream.validateWorkload" . | fromJsonArray)
  (include "inferstream.validateScaling" . | fromJsonArray)
) }}
{{- end }}

{{- define "inferstream.refuse" -}}
{{- with . }}
{{- fail (printf "\n\n%s\n" (join "\n" .)) }}
{{- end }}
{{- end }}

{{/*
Helm takes a value away that is set to null, and everything below it: what is left is no values file that the other
templates could read.
*/}}
{{- define "inferstream.validateNulls" -}}
{{- $problems := list }}
{{- range $path, $rule := include "inferstream.notNull" . | fromJson }}
{{- $steps := splitList "." $path }}
{{- $above := $.Values }}
{{- range initial $steps }}
{{- if kindIs "map" $above }}
{{- $above = get $above . }}
{{- end }}
{{- end }}
{{- if kindIs "map" $above }}
{{- $isThere := hasKey $above (last $steps) }}
{{- if or (and $isThere (kindIs "invalid" (get $above (last $steps)))) (and $rule.hasDefault (not $isThere)) }}
{{- $problems = append $problems (printf "%s must not be null: leave it out%s." $path $rule.orGive) }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
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
{{- else if not (regexMatch `^([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*$` .Values.image.repository) }}
{{- $problems = append $problems (printf "image.repository %s is not the name of an image: write it as registry.example.com/inferstream, in lower case, without https:// before it; a tag goes into image.tag, a digest into image.digest." .Values.image.repository) }}
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
{{- if eq .Values.workload.kind "StatefulSet" }}
{{- if ne .Values.workload.strategy "RollingUpdate" }}
{{- $problems = append $problems (printf "workload.strategy %s is for a Deployment and has no effect with workload.kind StatefulSet, whose pods are always replaced one by one: leave it out." .Values.workload.strategy) }}
{{- end }}
{{- if ne (toString .Values.workload.maxUnavailable) "1" }}
{{- $problems = append $problems (printf "workload.maxUnavailable %v is for a Deployment and has no effect with workload.kind StatefulSet, whose pods are always replaced one by one: leave it out." .Values.workload.maxUnavailable) }}
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
{{- else }}
{{- if gt (int .minReplicaCount) (int .maxReplicaCount) }}
{{- $problems = append $problems (printf "keda.minReplicaCount %d must not be above keda.maxReplicaCount %d." (int .minReplicaCount) (int .maxReplicaCount)) }}
{{- end }}
{{- $fallback := dig "replicas" 0 (default dict .fallback) | int }}
{{- if gt $fallback (int .maxReplicaCount) }}
{{- $problems = append $problems (printf "keda.fallback.replicas %d must not be above keda.maxReplicaCount %d." $fallback (int .maxReplicaCount)) }}
{{- end }}
{{- end }}
{{- if and (not (kindIs "invalid" .idleReplicaCount)) (ge (int .idleReplicaCount) (int .minReplicaCount)) }}
{{- $problems = append $problems (printf "keda.idleReplicaCount %d must be below keda.minReplicaCount %d." (int .idleReplicaCount) (int .minReplicaCount)) }}
{{- end }}
{{- end }}
{{- $security := dig "kafka" "security" dict .Values.config }}
{{- $isOwn := not .Values.keda.authenticationRef }}
{{- range $name := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- $setting := trimPrefix "INFERSTREAM_" $name | lower | replace "__" "." }}
{{- if or (has $setting (list "kafka.group_id" "input.topics" "input.start" "kafka.security.protocol" "kafka.security.mechanism"))
  (and (eq $setting "kafka.bootstrap_servers") (not $.Values.keda.kafka.bootstrapServers)) }}
{{- $problems = append $problems (printf "%s in extraEnv is not seen by KEDA, whose triggers are made of config: set config.%s%s." $name $setting (ternary ", or keda.kafka.bootstrapServers" "" (eq $setting "kafka.bootstrap_servers"))) }}
{{- else if and $isOwn (hasPrefix "kafka.security." $setting) }}
{{- $problems = append $problems (printf "%s in extraEnv is not seen by KEDA, which logs in by itself: name the Secret in secrets.kafka, or say in keda.authenticationRef how." $name) }}
{{- end }}
{{- end }}
{{- if and (or $security.ca_file $security.cert_file) $isOwn }}
{{- $problems = append $problems "config.kafka.security.ca_file and cert_file are files in the worker's pod, which KEDA cannot read: use secrets.kafka, or keda.authenticationRef." }}
{{- end }}
{{- if and (hasPrefix "SASL_" (include "inferstream.protocol" .)) $isOwn $security.password_file }}
{{- $problems = append $problems "config.kafka.security.password_file is a file in the worker's pod, which KEDA cannot read: use secrets.kafka.sasl.existingSecret, or keda.authenticationRef." }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}
