{{/* What the service would refuse of its settings as a whole, and what of them cannot be in more than one pod. */}}
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
{{- $kinds := dict "kafka.bootstrap_servers" "a broker, which is written HOST:PORT, as in kafka:9092" "input.topics" "a topic: letters, digits, '.', '_' and '-'" }}
{{- range $setting, $pattern := include "inferstream.itemPatterns" . | fromJson }}
{{- range $item := include "inferstream.list" (dig (splitList "." $setting | first) (splitList "." $setting | last) "" $.Values.config) | fromJsonArray }}
{{- if not (regexMatch $pattern (toString $item)) }}
{{- $problems = append $problems (printf "config.%s: %v is not %s." $setting $item (get $kinds $setting)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (not (include "inferstream.setting" (list . "kafka" "group_id"))) (not (has "INFERSTREAM_KAFKA__GROUP_ID" $given)) }}
{{- $problems = append $problems "config.kafka.group_id must not be empty: leave it out for `inferstream`." }}
{{- end }}
{{- if dig "kafka" "group_instance_id" "" .Values.config }}
{{- $problems = append $problems "config.kafka.group_instance_id would be the same in every pod, and of two members with one id one is thrown out: set workload.kind to StatefulSet, which gives each pod its own name." }}
{{- end }}
{{- if dig "kafka" "transactional_id" "" .Values.config }}
{{- $problems = append $problems "config.kafka.transactional_id would be the same in every pod, and each would fence the others: leave it out; workload.kind StatefulSet gives each pod a stable one." }}
{{- end }}
{{- if has "embedded" (include "inferstream.bootstrapServers" . | fromJsonArray) }}
{{- $problems = append $problems "config.kafka.bootstrap_servers embedded would start a broker of its own in every pod, which nobody else reaches and which forgets everything with it: name the brokers of a real Kafka, as in kafka:9092." }}
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

{{/* The service's own defaults of the settings that are compared below. */}}
{{- define "inferstream.defaults" -}}
kafka.session_timeout_ms: 45000
kafka.heartbeat_interval_ms: 3000
kafka.rebalance_timeout_ms: 60000
kafka.request_timeout_ms: 70000
batch.linger_ms: 5
delivery.guarantee: at-least-once
delivery.order: partition
delivery.commit_interval_ms: 1000
delivery.revoke_timeout_s: 10
delivery.transaction_timeout_ms: 10000
{{- end }}

{{/* Their values as JSON, without those that extraEnv gives, of which nothing is known here. */}}
{{- define "inferstream.compared" -}}
{{- $values := dict }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- range $setting, $default := include "inferstream.defaults" . | fromYaml }}
{{- if not (has (printf "INFERSTREAM_%s" ($setting | upper | replace "." "__")) $given) }}
{{- $value := dig (splitList "." $setting | last) $default (get $.Values.config (splitList "." $setting | first) | default dict) }}
{{- $_ := set $values $setting (ternary $default $value (kindIs "invalid" $value)) }}
{{- end }}
{{- end }}
{{- toJson $values }}
{{- end }}

{{- define "inferstream.validateTimes" -}}
{{- $problems := list }}
{{- $of := include "inferstream.compared" . | fromJson }}
{{- $session := get $of "kafka.session_timeout_ms" }}
{{- $heartbeat := get $of "kafka.heartbeat_interval_ms" }}
{{- $rebalance := get $of "kafka.rebalance_timeout_ms" }}
{{- $request := get $of "kafka.request_timeout_ms" }}
{{- $linger := get $of "batch.linger_ms" }}
{{- $revoke := get $of "delivery.revoke_timeout_s" }}
{{- $transaction := get $of "delivery.transaction_timeout_ms" }}
{{- if and (hasKey $of "delivery.revoke_timeout_s") (hasKey $of "kafka.rebalance_timeout_ms") }}
{{- if ge (mulf $revoke 1250) (mulf $rebalance 0.6) }}
{{- $problems = append $problems (printf "config.delivery.revoke_timeout_s %v with a commit after it would take more than 0.6 of config.kafka.rebalance_timeout_ms %s, and the group would throw the worker out: it must be below %v." $revoke (toString (int64 $rebalance)) (divf (mulf $rebalance 0.6) 1250)) }}
{{- end }}
{{- end }}
{{- if and (hasKey $of "kafka.request_timeout_ms") (hasKey $of "kafka.rebalance_timeout_ms") }}
{{- if le $request $rebalance }}
{{- $problems = append $problems (printf "config.kafka.request_timeout_ms %d must be above config.kafka.rebalance_timeout_ms %d: joining a group is one request that is answered when the rebalance ends." (int64 $request) (int64 $rebalance)) }}
{{- end }}
{{- end }}
{{- if and (hasKey $of "kafka.heartbeat_interval_ms") (hasKey $of "kafka.session_timeout_ms") }}
{{- if gt (mulf $heartbeat 3) $session }}
{{- $problems = append $problems (printf "config.kafka.heartbeat_interval_ms %d must be at most a third of config.kafka.session_timeout_ms %d, as two lost heartbeats must not end the session." (int64 $heartbeat) (int64 $session)) }}
{{- end }}
{{- end }}
{{- if and (hasKey $of "batch.linger_ms") (hasKey $of "delivery.revoke_timeout_s") }}
{{- if ge (mulf $linger 2) (mulf $revoke 1000) }}
{{- $problems = append $problems (printf "config.batch.linger_ms %v must be below half of config.delivery.revoke_timeout_s %v: a revoked partition would spend its time waiting for batches to fill." $linger $revoke) }}
{{- end }}
{{- end }}
{{- if eq (get $of "delivery.guarantee") "exactly-once" }}
{{- if eq (get $of "delivery.order") "none" }}
{{- $problems = append $problems "config.delivery.order none cannot be had with config.delivery.guarantee exactly-once, as a transaction commits one offset per partition: set it to partition." }}
{{- end }}
{{- /* Left out it is 100 under exactly-once. */ -}}
{{- $commit := dig "delivery" "commit_interval_ms" "" .Values.config | default 100 }}
{{- if and (hasKey $of "delivery.commit_interval_ms") (hasKey $of "delivery.transaction_timeout_ms") }}
{{- if gt (mulf $commit 3) $transaction }}
{{- $problems = append $problems (printf "config.delivery.commit_interval_ms %d must be at most a third of config.delivery.transaction_timeout_ms %d: a transaction lasts for a commit interval, and the broker would abort it." (int64 $commit) (int64 $transaction)) }}
{{- end }}
{{- end }}
{{- end }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- if not (or (has "INFERSTREAM_BATCH__MAX_TOKENS" $given) (has "INFERSTREAM_MODEL__MAX_LENGTH" $given) (has "INFERSTREAM_BUFFER__MAX_TOKENS" $given)) }}
{{- $batch := dig "max_tokens" "auto" (default dict .Values.config.batch) }}
{{- $length := dig "max_length" "auto" (default dict .Values.config.model) }}
{{- $buffer := dig "max_tokens" "auto" (default dict .Values.config.buffer) }}
{{- if not (or (kindIs "string" $batch) (kindIs "invalid" $batch)) }}
{{- if not (or (kindIs "string" $length) (kindIs "invalid" $length)) }}
{{- if gt (int64 $length) (int64 $batch) }}
{{- $problems = append $problems (printf "config.batch.max_tokens %d must not be below config.model.max_length %d: a full document would fit no batch." (int64 $batch) (int64 $length)) }}
{{- end }}
{{- end }}
{{- if not (or (kindIs "string" $buffer) (kindIs "invalid" $buffer)) }}
{{- if lt (int64 $buffer) (int64 $batch) }}
{{- $problems = append $problems (printf "config.buffer.max_tokens %d must not be below config.batch.max_tokens %d, better 16 times that: no batch would ever be full." (int64 $buffer) (int64 $batch)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateTopics" -}}
{{- $problems := list }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- $inputs := list }}
{{- if not (has "INFERSTREAM_INPUT__TOPICS" $given) }}
{{- $inputs = include "inferstream.inputTopics" . | fromJsonArray }}
{{- end }}
{{- if ne (len $inputs) (len (uniq $inputs)) }}
{{- $problems = append $problems (printf "config.input.topics names a topic twice (%s): name each once." (join ", " $inputs)) }}
{{- end }}
{{- $output := ternary "" (include "inferstream.setting" (list . "output" "topic")) (has "INFERSTREAM_OUTPUT__TOPIC" $given) }}
{{- $letters := "" }}
{{- if not (has "INFERSTREAM_DEAD_LETTER__TOPIC" $given) }}
{{- $letters = include "inferstream.setting" (list . "dead_letter" "topic") }}
{{- if and $output (has $letters (list "" "auto")) }}
{{- $letters = printf "%s.dead-letters" $output }}
{{- if gt (len $letters) 249 }}
{{- $problems = append $problems (printf "config.dead_letter.topic is required: %s… (config.output.topic with .dead-letters) is longer than the 249 characters that Kafka allows." (trunc 40 $letters)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and $output (has $output $inputs) }}
{{- $problems = append $problems (printf "config.output.topic %s must not be one of config.input.topics: each result would be read again, for ever." $output) }}
{{- end }}
{{- if and $letters (has $letters $inputs) }}
{{- $problems = append $problems (printf "config.dead_letter.topic %s must not be one of config.input.topics: each dead letter would be read again." $letters) }}
{{- end }}
{{- if and $output (eq $output $letters) }}
{{- $problems = append $problems (printf "config.dead_letter.topic and config.output.topic are both %s: results and dead letters must go to different topics." $output) }}
{{- end }}
{{- toJson $problems }}
{{- end }}

{{- define "inferstream.validateSecurity" -}}
{{- $problems := list }}
{{- $protocol := include "inferstream.protocol" . }}
{{- $security := dig "kafka" "security" dict .Values.config }}
{{- $given := include "inferstream.extraEnvNames" . | fromJsonArray }}
{{- /* What extraEnv gives is not known here. */ -}}
{{- $isKnown := not (has "INFERSTREAM_KAFKA__SECURITY__PROTOCOL" $given) }}
{{- $isEncrypted := has $protocol (list "SSL" "SASL_SSL") }}
{{- $isLogin := hasPrefix "SASL_" $protocol }}
{{- if $security.password }}
{{- $problems = append $problems "config.kafka.security.password is a secret, and values and ConfigMaps are read by many: put it into a Secret and name that in secrets.kafka.sasl.existingSecret." }}
{{- end }}
{{- /* Setting → where it is given, empty for nowhere. */ -}}
{{- $at := dict }}
{{- range $name := list "mechanism" "username" "password" "password_file" "ca_file" "cert_file" "key_file" "key_password_file" }}
{{- $variable := printf "INFERSTREAM_KAFKA__SECURITY__%s" (upper $name) }}
{{- $_ := set $at $name (ternary (printf "%s in extraEnv" $variable) (ternary (printf "config.kafka.security.%s" $name) "" (not (empty (get $security $name)))) (has $variable $given)) }}
{{- end }}
{{- with .Values.secrets.kafka }}
{{- $byChart := dict }}
{{- if .sasl.existingSecret }}
{{- $_ := set $byChart "password_file" "secrets.kafka.sasl.existingSecret" }}
{{- if .sasl.usernameKey }}
{{- $_ := set $byChart "username" "secrets.kafka.sasl.usernameKey" }}
{{- end }}
{{- end }}
{{- if or .ca.existingSecret .ca.existingConfigMap }}
{{- $_ := set $byChart "ca_file" "secrets.kafka.ca" }}
{{- end }}
{{- if .client.existingSecret }}
{{- $_ := set $byChart "cert_file" "secrets.kafka.client" }}
{{- $_ := set $byChart "key_file" "secrets.kafka.client" }}
{{- if .client.keyPasswordKey }}
{{- $_ := set $byChart "key_password_file" "secrets.kafka.client.keyPasswordKey" }}
{{- end }}
{{- end }}
{{- range $name, $secret := $byChart }}
{{- with get $at $name }}
{{- $problems = append $problems (printf "%s and %s both give the %s: use one." . $secret (replace "_" " " $name)) }}
{{- end }}
{{- end }}
{{- if and $at.password (or .sasl.existingSecret $at.password_file) (not $security.password) }}
{{- $problems = append $problems (printf "%s and %s both hold the password: use one." $at.password (default "secrets.kafka.sasl.existingSecret" $at.password_file)) }}
{{- end }}
{{- if and $isKnown $isLogin }}
{{- if not $at.mechanism }}
{{- $problems = append $problems (printf "config.kafka.security.mechanism is required with protocol %s: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512." $protocol) }}
{{- end }}
{{- if not (or $at.username $byChart.username) }}
{{- $problems = append $problems (printf "config.kafka.security.username is required with protocol %s, there or by secrets.kafka.sasl.usernameKey." $protocol) }}
{{- end }}
{{- if not (or $at.password $at.password_file .sasl.existingSecret) }}
{{- $problems = append $problems (printf "secrets.kafka.sasl.existingSecret is required with protocol %s: the name of a Secret with the password." $protocol) }}
{{- end }}
{{- end }}
{{- if and $isKnown (not $isLogin) }}
{{- range $name := list "mechanism" "username" "password_file" "password" }}
{{- if and (get $at $name) (not (and $security.password (eq $name "password"))) }}
{{- $problems = append $problems (printf "%s has no use with config.kafka.security.protocol %s: set it to SASL_SSL, or leave out the %s." (get $at $name) $protocol (replace "_" " " $name)) }}
{{- end }}
{{- end }}
{{- if .sasl.existingSecret }}
{{- $problems = append $problems (printf "secrets.kafka.sasl.existingSecret has no use with config.kafka.security.protocol %s: set it to SASL_SSL, or SASL_PLAINTEXT." $protocol) }}
{{- end }}
{{- end }}
{{- if and $isKnown (not $isEncrypted) }}
{{- range $name := list "ca_file" "cert_file" "key_file" "key_password_file" }}
{{- if get $at $name }}
{{- $problems = append $problems (printf "%s has no use with config.kafka.security.protocol %s: set it to SSL or SASL_SSL, or leave out the file." (get $at $name) $protocol) }}
{{- end }}
{{- end }}
{{- range $what, $name := dict "ca.existingSecret" .ca.existingSecret "ca.existingConfigMap" .ca.existingConfigMap "client.existingSecret" .client.existingSecret }}
{{- if $name }}
{{- $problems = append $problems (printf "secrets.kafka.%s has no use with config.kafka.security.protocol %s: set it to SSL or SASL_SSL." $what $protocol) }}
{{- end }}
{{- end }}
{{- end }}
{{- if not .client.existingSecret }}
{{- range $name, $other := dict "cert_file" "key_file" "key_file" "cert_file" "key_password_file" "key_file" }}
{{- if and (get $at $name) (not (get $at $other)) }}
{{- $problems = append $problems (printf "%s needs config.kafka.security.%s beside it; secrets.kafka.client names a Secret with both." (get $at $name) $other) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .sasl.usernameKey (not .sasl.existingSecret) }}
{{- $problems = append $problems "secrets.kafka.sasl.usernameKey is a key of secrets.kafka.sasl.existingSecret, which is empty." }}
{{- end }}
{{- if and .ca.existingSecret .ca.existingConfigMap }}
{{- $problems = append $problems "secrets.kafka.ca.existingSecret and existingConfigMap both hold the authorities: use one." }}
{{- end }}
{{- end }}
{{- toJson $problems }}
{{- end }}
