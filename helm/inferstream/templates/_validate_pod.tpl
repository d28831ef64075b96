{{/* Variables that would contradict what the chart makes of the values, and secrets in plain text. */}}
{{- define "inferstream.validateEnvironment" -}}
{{- $problems := list }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- $derived := dict
  "INFERSTREAM_DELIVERY__DRAIN_TIMEOUT_S" "would not be what the pod's grace period is made of: set config.delivery.drain_timeout_s"
  "INFERSTREAM_TELEMETRY__HOST" "would not be what the probes rely on: set config.telemetry.host"
  "INFERSTREAM_TELEMETRY__PORT" "would not be what the pod's port, its probes and monitors are made of: set config.telemetry.port"
  "INFERSTREAM_KAFKA__GROUP_INSTANCE_ID" "would contradict what the chart gives each pod: set workload.kind to StatefulSet, which names each after its pod"
  "INFERSTREAM_KAFKA__TRANSACTIONAL_ID" "would contradict what the chart gives each pod: leave it out; workload.kind StatefulSet gives each a stable one" }}
{{- if eq .Values.workload.kind "StatefulSet" }}
{{- $_ := set $derived "INFERSTREAM_KAFKA__GROUP_ID" "would not be what the pods' transactional ids are made of: set config.kafka.group_id" }}
{{- $_ := set $derived "INFERSTREAM_DELIVERY__GUARANTEE" "would not be what the pods' transactional ids are made for: set config.delivery.guarantee" }}
{{- end }}
{{- if .Values.model.download.source }}
{{- $_ := set $derived "INFERSTREAM_MODEL__ID" "would not be the folder that model.download fills: set config.model.id" }}
{{- end }}
{{- range $variable, $why := $derived }}
{{- if has $variable $given }}
{{- $problems = append $problems (printf "%s in extraEnv %s." $variable $why) }}
{{- end }}
{{- end }}
{{- range $where, $variables := dict "extraEnv" .Values.extraEnv "model.download.env" .Values.model.download.env }}
{{- range $variables }}
{{- if and (hasKey . "value") (regexMatch "(PASSWORD|SECRET|TOKEN|_KEY)$" (toString .name)) }}
{{- $problems = append $problems (printf "%s in %s is a secret by its name, and values and manifests are read by many: give it by valueFrom.secretKeyRef." .name $where) }}
{{- end }}
{{- end }}
{{- end }}
{{- $secret := "(secret.access.key|session.token|service.account.credentials|sas.url|client.secret|password|pass|token|[,-](key|secret))" }}
{{- if regexMatch (printf "%s=" $secret) .Values.model.download.source }}
{{- $problems = append $problems "model.download.source holds a secret, and values and manifests are read by many: write env_auth in its place, and give it by model.download.env or envFrom." }}
{{- end }}
{{- range .Values.model.download.extraArgs }}
{{- if regexMatch (printf "^-.*%s(=|$)" $secret) . }}
{{- $problems = append $problems (printf "model.download.extraArgs %s is a secret, and values and manifests are read by many: give it by model.download.env or envFrom, as rclone reads every option from a variable too." (splitList "=" . | first)) }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateModel" -}}
{{- $problems := list }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- /* Both are unknown where extraEnv gives them. */ -}}
{{- $isIdKnown := not (has "INFERSTREAM_MODEL__ID" $given) }}
{{- $isDeviceKnown := not (has "INFERSTREAM_MODEL__DEVICE" $given) }}
{{- $id := include "inferstream.setting" (list . "model" "id") }}
{{- $isLocal := or (hasPrefix "/" $id) (hasPrefix "package:" $id) (hasPrefix "builtin:" $id) (not $isIdKnown) }}
{{- $shown := ternary "of the default config.model.id" (printf "%q" $id) (eq $id "") }}
{{- with .Values.model }}
{{- $isBelow := and $isIdKnown (hasPrefix (printf "%s/" .storage.mountPath) (printf "%s/" $id)) }}
{{- $isMounted := false }}
{{- range $.Values.extraVolumeMounts }}
{{- $isMounted = or $isMounted (hasPrefix (printf "%s/" (trimSuffix "/" (toString .mountPath))) (printf "%s/" $id)) }}
{{- end }}
{{- $isFilled := or .download.source $.Values.extraInitContainers }}
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
{{- if and $isBelow (eq .storage.kind "emptyDir") (not $isFilled) (not $isMounted) }}
{{- $problems = append $problems (printf "config.model.id %s is a folder in model.storage, which is empty in every new pod: fill it by model.download or extraInitContainers, or set model.storage.kind to existingClaim with a claim that has it." $id) }}
{{- end }}
{{- if and .offline (not $isLocal) (not $isFilled) }}
{{- if eq .storage.kind "emptyDir" }}
{{- $problems = append $problems (printf "model.offline finds no model %s in an empty model.storage: use a claim that has it, or set config.model.id to a folder of the image or to package:NAME." $shown) }}
{{- else if and (eq .storage.kind "claim") $.Release.IsInstall }}
{{- $problems = append $problems (printf "model.offline finds no model %s in a claim that the chart makes, which is empty at first: install without it and set it in an upgrade, use a claim of yours that has the model, or model.download." $shown) }}
{{- end }}
{{- end }}
{{- if and .offline $.Values.secrets.hub.existingSecret }}
{{- $problems = append $problems "secrets.hub.existingSecret has no use with model.offline, which asks no hub." }}
{{- end }}
{{- if and .download.source $isIdKnown (not (hasPrefix (printf "%s/" .storage.mountPath) $id)) }}
{{- $problems = append $problems (printf "config.model.id must be the folder that model.download fills, below model.storage.mountPath: %s/NAME." .storage.mountPath) }}
{{- end }}
{{- end }}
{{- $device := default "auto" (include "inferstream.setting" (list . "model" "device")) }}
{{- if and $isDeviceKnown .Values.gpu.enabled (eq $device "cpu") }}
{{- $problems = append $problems "config.model.device is cpu, and gpu.enabled would keep a GPU from others: leave out one of the two." }}
{{- end }}
{{- if and $isDeviceKnown .Values.gpu.enabled (hasPrefix "cuda:" $device) (ge (atoi (trimPrefix "cuda:" $device)) (int .Values.gpu.count)) }}
{{- $problems = append $problems (printf "config.model.device is %s, and a pod has as many GPUs as gpu.count says, %d, the first of which is cuda:0 to it: leave it out." $device (int .Values.gpu.count)) }}
{{- end }}
{{- if and $isDeviceKnown (eq $device "cpu") (eq (include "inferstream.setting" (list . "model" "dtype")) "float16") (not (has "INFERSTREAM_MODEL__DTYPE" $given)) }}
{{- $problems = append $problems "config.model.dtype float16 is not for config.model.device cpu: use float32, or bfloat16 where the CPU has it." }}
{{- end }}
{{- if and (hasPrefix "cuda" $device) (not .Values.gpu.enabled) (not .Values.resourceClaims) }}
{{- $extended := "" }}
{{- range $name, $_ := default dict .Values.resources.limits }}
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

{{- define "inferstream.validateLabels" -}}
{{- $problems := list }}
{{- $selecting := list "app.kubernetes.io/name" "app.kubernetes.io/instance" }}
{{- $own := concat $selecting (list "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "helm.sh/chart") }}
{{- $metrics := .Values.metrics }}
{{- range $where, $labels := dict
  "commonLabels" .Values.commonLabels
  "podLabels" .Values.podLabels
  "service.labels" .Values.service.labels
  "metrics.serviceMonitor.labels" $metrics.serviceMonitor.labels
  "metrics.podMonitor.labels" $metrics.podMonitor.labels
  "metrics.prometheusRule.labels" $metrics.prometheusRule.labels
  "metrics.dashboards.labels" $metrics.dashboards.labels }}
{{- range $name, $_ := $labels }}
{{- if has $name (ternary $selecting $own (eq $where "podLabels")) }}
{{- $problems = append $problems (printf "%s must not set %s, which the chart sets itself%s." $where $name (ternary " and finds its pods by: use nameOverride, or another release" ": leave it out" (has $name $selecting))) }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateResources" -}}
{{- $problems := list }}
{{- range $where, $resources := dict "resources" .Values.resources "model.download.resources" .Values.model.download.resources "topics.resources" .Values.topics.resources }}
{{- range $name, $request := default dict $resources.requests }}
{{- $limit := get (default dict $resources.limits) $name }}
{{- if and $limit $request }}
{{- if gt (include "inferstream.quantity" $request | float64) (include "inferstream.quantity" $limit | float64) }}
{{- $problems = append $problems (printf "%[1]s.requests.%[2]s %[3]v is above %[1]s.limits.%[2]s %[4]v (what you leave out is the chart's default): set both." $where $name $request $limit) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{/* A resource quantity as a number: "250m" is 0.25, "4Gi" 4294967296. */}}
{{- define "inferstream.quantity" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 }}
{{- if kindIs "string" . }}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-zA-Z]*$" .)) }}
{{- else }}
{{- float64 . }}
{{- end }}
{{- end }}

{{- define "inferstream.validateVolumes" -}}
{{- $problems := list }}
{{- $paths := list "/tmp" "/cache" "/etc/inferstream" "/etc/inferstream/config.yaml" (include "inferstream.secretsPath" .) }}
{{- $names := list "config" "tmp" "cache" "models" "kafka" }}
{{- if .Values.shm.enabled }}
{{- $paths = append $paths "/dev/shm" }}
{{- $names = append $names "shm" }}
{{- end }}
{{- $storage := .Values.model.storage }}
{{- if has $storage.mountPath $paths }}
{{- $problems = append $problems (printf "model.storage.mountPath %s is a place of the chart's own: use another, such as /models." $storage.mountPath) }}
{{- end }}
{{- range .Values.extraVolumeMounts }}
{{- if has (trimSuffix "/" (toString .mountPath)) (append $paths $storage.mountPath) }}
{{- $problems = append $problems (printf "extraVolumeMounts has a mountPath %s, which is a place of the chart's own: use another." .mountPath) }}
{{- end }}
{{- end }}
{{- range .Values.extraVolumes }}
{{- if has .name $names }}
{{- $problems = append $problems (printf "extraVolumes has a volume %s, which is a name of the chart's own (%s): use another." .name (join ", " $names)) }}
{{- end }}
{{- end }}
{{- $pods := int .Values.workload.replicas }}
{{- if include "inferstream.isScaled" . }}
{{- $pods = ternary .Values.keda.maxReplicaCount .Values.autoscaling.maxReplicas .Values.keda.enabled | int }}
{{- end }}
{{- if and (eq $storage.kind "claim") (eq .Values.workload.kind "Deployment") (has "ReadWriteOncePod" $storage.claim.accessModes) (gt $pods 1) }}
{{- $problems = append $problems "model.storage.claim.accessModes ReadWriteOncePod lets one pod have the claim, and the others would wait for it for ever: use ReadWriteMany, an emptyDir, or workload.kind StatefulSet." }}
{{- end }}
{{- toJson $problems }}
{{- end }}
