{{/* Egress that workers and commands beside them need: names and brokers. */}}
{{- define "inferstream.kafkaEgress" -}}
{{- $ports := .Values.networkPolicy.kafkaPorts }}
{{- if not $ports }}
{{- range include "inferstream.bootstrapServers" . | fromJsonArray }}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) }}
{{- end }}
{{- end }}
# DNS: names of brokers are looked up again and again.
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
- ports:
    {{- range $ports | uniq }}
    - port: {{ . | int }}
      protocol: TCP
    {{- end }}
  {{- with .Values.networkPolicy.kafkaTo }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* The ports that a model comes from, as a JSON list: the hub's, and an object storage's. */}}
{{- define "inferstream.modelPorts" -}}
{{- $ports := list }}
{{- if not .Values.model.offline }}
{{- $hub := urlParse (default "https://huggingface.co" .Values.model.hubEndpoint) }}
{{- $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" $hub.host) | default (ternary "80" "443" (eq $hub.scheme "http")) | int) }}
{{- end }}
{{- if .Values.model.download.source }}
{{- $ports = append $ports 443 }}
{{- end }}
{{- $ports | uniq | toJson }}
{{- end }}

{{/* What the pods of hooks need: Kafka, and a worker's metrics for `helm test`. They listen to nobody. */}}
{{- define "inferstream.hookPolicySpec" -}}
podSelector:
  matchLabels: {{- include "inferstream.hookSelectorLabels" . | nindent 4 }}
policyTypes: [Ingress, Egress]
egress:
  {{- include "inferstream.kafkaEgress" . | trim | nindent 2 }}
  - to:
      - podSelector:
          matchLabels: {{- include "inferstream.selectorLabels" . | nindent 12 }}
    ports:
      - port: {{ include "inferstream.setting" (list . "telemetry" "port") }}
        protocol: TCP
  {{- with .Values.networkPolicy.extraEgress }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
