{{/* One endpoint of a ServiceMonitor or PodMonitor. */}}
{{- define "inferstream.monitorEndpoint" -}}
- port: metrics
  path: /metrics
  {{- with .interval }}
  interval: {{ . }}
  {{- end }}
  {{- with .scrapeTimeout }}
  scrapeTimeout: {{ . }}
  {{- end }}
  {{- with .relabelings }}
  relabelings: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .metricRelabelings }}
  metricRelabelings: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "inferstream.monitorMetadata" -}}
{{- $root := index . 0 -}}
name: {{ include "inferstream.fullname" $root }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "inferstream.labels" $root | nindent 2 }}
  {{- with index . 1 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
