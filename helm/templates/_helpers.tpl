{{- define "tallyman.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "tallyman.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $both := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{ default $both .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "tallyman.labels" -}}
{{ include "tallyman.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* A selector cannot be changed, and what is mounted is named after the pipeline: so an upgrade that renames it,
     which would bill everything again, is refused by the cluster, and leaves what runs as it is. */}}
{{- define "tallyman.selector" -}}
app.kubernetes.io/name: {{ include "tallyman.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
tallyman/pipeline: {{ include "tallyman.pipeline" . }}
{{- end }}

{{- define "tallyman.pipeline" -}}
{{ .Values.config.pipeline | replace "_" "-" | replace "." "-" | trunc 20 | trimSuffix "-" }}-{{ .Values.config.pipeline | sha256sum | trunc 8 }}
{{- end }}

{{- define "tallyman.configMap" -}}
{{ include "tallyman.fullname" . | trunc 34 | trimSuffix "-" }}-{{ include "tallyman.pipeline" . }}
{{- end }}

{{- define "tallyman.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "tallyman.imagePullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "tallyman.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "tallyman.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "tallyman.sqlite" -}}
{{ if eq (dig "storage" "kind" "sqlite" .Values.config) "sqlite" }}yes{{ end }}
{{- end }}

{{- define "tallyman.port" -}}
{{ int (dig "http" "port" 9464 .Values.config) }}
{{- end }}

{{- /* Where notifications of Stripe's are taken; empty where they are not. */}}
{{- define "tallyman.webhookPort" -}}
{{ with .Values.config }}{{ if kindIs "map" .webhook }}{{ int (dig "port" 9465 .webhook) }}{{ end }}{{ end }}
{{- end }}

{{- /* What is deployed: one process for both stages, or one for each. Names as in values. */}}
{{- define "tallyman.workloads" -}}
{{ ternary "service" "aggregate deliver" (eq "yes" (include "tallyman.sqlite" .)) }}
{{- end }}

{{- define "tallyman.workloadName" -}}
{{ include "tallyman.fullname" .root }}{{ if ne .component "service" }}-{{ .component }}{{ end }}
{{- end }}

{{- /* A Secret and a key in it for each variable that a component gets: counting needs no key of Stripe's. */}}
{{- define "tallyman.secrets" -}}
{{- $made := ternary (include "tallyman.fullname" .root) "" .root.Values.externalSecret.enabled }}
{{- range $variable, $at := .root.Values.secrets }}
{{- if not (and (eq $.component "aggregate") (hasPrefix "STRIPE_" $variable)) }}
{{- $at = default dict $at }}
{{- $by := ternary $made $.root.Values.existingSecret (hasKey $.root.Values.externalSecret.data $variable) }}
{{ $variable }}:
  name: {{ required (printf "secrets.%s: set existingSecret, or name the Secret that has it here" $variable) (default $by $at.name) | quote }}
  key: {{ default $variable $at.key | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The pod of a component, from what it runs on. Arguments: root, component, configMap, args; container and
     claim, where a process is more than a command and a volume is not its own. */}}
{{- define "tallyman.pod" -}}
{{- $values := .root.Values }}
{{- $secrets := include "tallyman.secrets" . | fromYaml -}}
serviceAccountName: {{ include "tallyman.serviceAccount" .root }}
automountServiceAccountToken: false
{{- include "tallyman.imagePullSecrets" .root }}
enableServiceLinks: false
securityContext: {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: tallyman
    image: {{ include "tallyman.image" .root | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args: {{- toYaml .args | nindent 6 }}
    env:
      - name: TALLYMAN_LOG_LEVEL
        value: {{ $values.logLevel }}
      {{- range $variable, $_ := $secrets }}
      - name: {{ $variable }}_FILE
        value: /run/secrets/tallyman/{{ $variable }}
      {{- end }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
    {{- with .container }}
    {{- . | nindent 4 }}
    {{- end }}
    volumeMounts:
      - {name: config, mountPath: /tallyman/config, readOnly: true}
      - {name: tmp, mountPath: /tmp}
      {{- if include "tallyman.customers" .root }}
      - {name: customers, mountPath: /tallyman/customers, readOnly: true}
      {{- end }}
      {{- if $secrets }}
      - {name: secrets, mountPath: /run/secrets/tallyman, readOnly: true}
      {{- end }}
      {{- if include "tallyman.sqlite" .root }}
      - {name: state, mountPath: /tallyman/var}
      {{- end }}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ .configMap }}
      items: [{key: tallyman.yaml, path: tallyman.yaml}]
  - name: tmp
    emptyDir: {sizeLimit: 64Mi}
  {{- if include "tallyman.customers" .root }}
  - name: customers
    configMap:
      name: {{ default .configMap $values.customers.existingConfigMap }}
      items: [{key: customers.yaml, path: customers.yaml}]
  {{- end }}
  {{- if $secrets }}
  - name: secrets
    projected:
      defaultMode: 0440
      sources:
        {{- range $variable, $at := $secrets }}
        - secret:
            name: {{ $at.name }}
            items: [{key: {{ $at.key | quote }}, path: {{ $variable }}}]
        {{- end }}
  {{- end }}
  {{- with .claim }}
  - name: state
    persistentVolumeClaim: {claimName: {{ . }}}
  {{- end }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "tallyman.customers" -}}
{{ if eq (dig "customers" "kind" "passthrough" .Values.config) "file" }}yes{{ end }}
{{- end }}

{{- /* What a ConfigMap holds. */}}
{{- define "tallyman.files" -}}
tallyman.yaml: |
  {{- toYaml .Values.config | nindent 2 }}
{{- if and (include "tallyman.customers" .) (not .Values.customers.existingConfigMap) }}
customers.yaml: |
  {{- required "config.customers.kind is file: set customers.existingConfigMap, or customers.file" .Values.customers.file | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The pod of a command that ends by itself, beside the service. Arguments: root, command, configMap, args. */}}
{{- define "tallyman.command" -}}
{{- $sqlite := include "tallyman.sqlite" .root }}
{{- $component := ternary "service" "deliver" (eq $sqlite "yes") }}
{{- if and $sqlite (eq .root.Values.persistence.accessMode "ReadWriteOncePod") }}
{{- fail "check.enabled and reconcile.enabled: they read the state beside the service, which persistence.accessMode ReadWriteOncePod does not allow: choose" }}
{{- end }}
metadata:
  labels: {{- include "tallyman.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .command }}
spec:
  restartPolicy: Never
  {{- $claim := "" }}
  {{- $container := dict "resources" (index .root.Values $component).resources | toYaml }}
  {{- if $sqlite }}
  {{- $claim = printf "state-%s-0" (include "tallyman.fullname" .root) }}
  # A volume of one node is read where the service has it.
  affinity:
    podAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector:
              matchLabels: {{- include "tallyman.selector" .root | nindent 16 }}
                app.kubernetes.io/component: service
  {{- end }}
  {{- include "tallyman.pod" (dict "root" .root "component" $component "configMap" .configMap "args" .args "claim" $claim "container" $container) | nindent 2 }}
{{- end }}
