{{- define "inferstream.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* At most 52 characters: a StatefulSet adds a hash to make a label of 63, and KEDA a prefix to make an HPA's name. */}}
{{- define "inferstream.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "inferstream.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "inferstream.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "inferstream.selectorLabels" -}}
app.kubernetes.io/name: {{ include "inferstream.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "inferstream.labels" -}}
{{ include "inferstream.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of what is made by hooks: another `name`, so that no selector of the worker's takes those pods for workers. */}}
{{- define "inferstream.hookSelectorLabels" -}}
app.kubernetes.io/name: {{ include "inferstream.name" . }}-hook
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "inferstream.hookLabels" -}}
{{ include "inferstream.hookSelectorLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "inferstream.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "inferstream.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "inferstream.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether something else than the chart decides how many pods there are; empty for no. */}}
{{- define "inferstream.isScaled" -}}
{{- if or .Values.keda.enabled .Values.autoscaling.enabled }}true{{ end }}
{{- end }}

{{/* Settings that are lists may be written as texts with commas, or as JSON; a JSON list here. */}}
{{- define "inferstream.list" -}}
{{- if kindIs "string" . }}
{{- if hasPrefix "[" (trim .) }}
{{- fromJsonArray . | toJson }}
{{- else }}
{{- $items := list }}
{{- range splitList "," . }}
{{- with trim . }}
{{- $items = append $items . }}
{{- end }}
{{- end }}
{{- toJson $items }}
{{- end }}
{{- else }}
{{- toJson (default list .) }}
{{- end }}
{{- end }}

{{/* extraEnv with its templates filled in, as a JSON list. */}}
{{- define "inferstream.extraEnv" -}}
{{- tpl (toYaml .Values.extraEnv) . | fromYamlArray | toJson }}
{{- end }}

{{/* Names of the variables in extraEnv, as a JSON list: each can stand in for a setting of `config`. */}}
{{- define "inferstream.extraEnvNames" -}}
{{- include "inferstream.names" (include "inferstream.extraEnv" . | fromJsonArray) }}
{{- end }}

{{/* The names of a list's entries, as a JSON list. */}}
{{- define "inferstream.names" -}}
{{- $names := list }}
{{- range . }}
{{- $names = append $names .name }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{/* An environment of the chart's variables (YAML) and then the user's (a list), which replace those of the same name: a
name that is there twice is refused by server-side apply, and so by Helm 4. */}}
{{- define "inferstream.mergedEnv" -}}
{{- $given := index . 1 }}
{{- $names := include "inferstream.names" $given | fromJsonArray }}
{{- $env := list }}
{{- range index . 0 | fromYamlArray }}
{{- if not (has .name $names) }}
{{- $env = append $env . }}
{{- end }}
{{- end }}
{{- toYaml (concat $env $given) }}
{{- end }}
