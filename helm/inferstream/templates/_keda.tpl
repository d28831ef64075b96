{{/* KEDA's names of the SASL mechanisms. */}}
{{- define "inferstream.kedaSasl" -}}
{{- get (dict "PLAIN" "plaintext" "SCRAM-SHA-256" "scram_sha256" "SCRAM-SHA-512" "scram_sha512") (include "inferstream.setting" (list . "kafka" "security" "mechanism")) }}
{{- end }}

{{- define "inferstream.protocol" -}}
{{- default "PLAINTEXT" (include "inferstream.setting" (list . "kafka" "security" "protocol")) }}
{{- end }}

{{/* Metadata of the trigger of one topic. Its values must all be texts: the CRD refuses numbers. */}}
{{- define "inferstream.kedaMetadata" -}}
{{- $root := index . 0 }}
{{- $protocol := include "inferstream.protocol" $root }}
{{- with $root.Values.keda.kafka -}}
bootstrapServers: {{ default (include "inferstream.bootstrapServers" $root | fromJsonArray | join ",") .bootstrapServers | quote }}
consumerGroup: {{ include "inferstream.setting" (list $root "kafka" "group_id") | quote }}
topic: {{ index $ 1 | quote }}
# As the worker begins where its group has no offset; `error` begins nowhere, and then all that is there counts.
offsetResetPolicy: {{ eq (include "inferstream.setting" (list $root "input" "start")) "latest" | ternary "latest" "earliest" }}
lagThreshold: {{ .lagThreshold | int64 | quote }}
activationLagThreshold: {{ .activationLagThreshold | int64 | quote }}
allowIdleConsumers: {{ .allowIdleConsumers | quote }}
scaleToZeroOnInvalidOffset: {{ .scaleToZeroOnInvalidOffset | quote }}
excludePersistentLag: {{ .excludePersistentLag | quote }}
limitToPartitionsWithLag: {{ .limitToPartitionsWithLag | quote }}
ensureEvenDistributionOfPartitions: {{ .ensureEvenDistributionOfPartitions | quote }}
{{- with .partitionLimitation }}
partitionLimitation: {{ . | quote }}
{{- end }}
{{- with .version }}
version: {{ . | quote }}
{{- end }}
tls: {{ has $protocol (list "SSL" "SASL_SSL") | ternary "enable" "disable" }}
sasl: {{ hasPrefix "SASL_" $protocol | ternary (include "inferstream.kedaSasl" $root) "none" }}
{{- end }}
{{- end }}

{{/* How KEDA reaches the brokers: the worker's own secrets, by reference. Empty where it needs none. */}}
{{- define "inferstream.kedaAuthentication" -}}
{{- $secrets := list }}
{{- $maps := list }}
{{- with .Values.secrets.kafka }}
{{- if .sasl.existingSecret }}
{{- $secrets = append $secrets (dict "parameter" "password" "name" .sasl.existingSecret "key" .sasl.passwordKey) }}
{{- if .sasl.usernameKey }}
{{- $secrets = append $secrets (dict "parameter" "username" "name" .sasl.existingSecret "key" .sasl.usernameKey) }}
{{- else }}
{{- $maps = append $maps (dict "parameter" "username" "name" (include "inferstream.fullname" $) "key" "kafka-username") }}
{{- end }}
{{- end }}
{{- if .ca.existingSecret }}
{{- $secrets = append $secrets (dict "parameter" "ca" "name" .ca.existingSecret "key" .ca.key) }}
{{- else if .ca.existingConfigMap }}
{{- $maps = append $maps (dict "parameter" "ca" "name" .ca.existingConfigMap "key" .ca.key) }}
{{- end }}
{{- if .client.existingSecret }}
{{- $secrets = append $secrets (dict "parameter" "cert" "name" .client.existingSecret "key" .client.certKey) }}
{{- $secrets = append $secrets (dict "parameter" "key" "name" .client.existingSecret "key" .client.keyKey) }}
{{- if .client.keyPasswordKey }}
{{- $secrets = append $secrets (dict "parameter" "keyPassword" "name" .client.existingSecret "key" .client.keyPasswordKey) }}
{{- end }}
{{- end }}
{{- end }}
{{- with $secrets }}
secretTargetRef: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $maps }}
configMapTargetRef: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
