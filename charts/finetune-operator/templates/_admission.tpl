{{/* CEL: whether a value matches one of the patterns, from a dict with value (CEL) and patterns. */}}
{{- define "finetune-operator.matches" -}}
{{- $terms := list }}
{{- range .patterns }}
{{- if hasSuffix "*" . }}
{{- $terms = append $terms (printf "%s.startsWith(%s)" $.value (trimSuffix "*" . | toJson)) }}
{{- else }}
{{- $terms = append $terms (printf "%s == %s" $.value (toJson .)) }}
{{- end }}
{{- end }}
{{- $terms | join " || " | default "false" }}
{{- end }}

{{/* CEL: faults of keys that are not allowed, from a dict with map (CEL), path and allowed. */}}
{{- define "finetune-operator.otherKeys" -}}
{{ .map }}.filter(k, !(k in {{ toJson .allowed }})).map(k, '{{ .path }}.' + k)
{{- end }}

{{/* CEL: faults of storage endpoints, of the job and of its sources. */}}
{{- define "finetune-operator.endpointFaults" -}}
{{- $patterns := .Values.admission.storageEndpoints }}
{{- $matches := include "finetune-operator.matches" (dict "value" "v" "patterns" $patterns) }}
{{- $places := dict "spec.storage" "[object.spec.?storage]"
  "spec.model.storage" "[object.spec.model.?storage].filter(s, s.hasValue())" }}
{{- range list "train" "validation" "test" }}
{{- $sources := printf "object.spec.data.?%s.orValue([])" . }}
{{- $given := printf "%s.map(s, s.?storage).filter(s, s.hasValue())" $sources }}
{{- $_ := set $places (printf "spec.data.%s[].storage" .) $given }}
{{- end }}
{{- $faults := list }}
{{- range $path, $accesses := $places }}
{{- $values := printf "%s.map(s, s.?endpoint.orValue('https://s3.amazonaws.com'))" $accesses }}
{{- $refused := printf "%s.filter(v, !(%s))" $values $matches }}
{{- $faults = append $faults (printf "%s.map(v, '%s.endpoint: ' + v)" $refused $path) }}
{{- end }}
{{- $faults | join " + " }}
{{- end }}

{{/* CEL: faults of tolerations. */}}
{{- define "finetune-operator.tolerationFaults" -}}
{{- $denied := toJson .Values.admission.deniedTolerations }}
{{- $places := dict "spec.prepare" "object.spec.?prepare.tolerations"
  "spec.compute.podTemplate.spec" "variables.podSpec.?tolerations" }}
{{- $faults := list }}
{{- range $path, $tolerations := $places }}
{{- $keys := printf "%s.orValue([]).map(t, t.?key.orValue(''))" $tolerations }}
{{- $refused := printf "%s.filter(v, v == '' || v in %s)" $keys $denied }}
{{- $text := printf "'%s.tolerations[].key: ' + (v == '' ? 'every key' : v)" $path }}
{{- $faults = append $faults (printf "%s.map(v, %s)" $refused $text) }}
{{- end }}
{{- $faults | join " + " }}
{{- end }}

{{/*
Rules of the admission policy, as a list in YAML. Each has
  name
  allowed: values that are allowed, for the message, and
  faults: CEL, the list of what is not allowed, each with its path and value.
*/}}
{{- define "finetune-operator.admissionRules" -}}
{{- $limits := .Values.admission }}
{{- $repository := .Values.trainer.image.repository }}
{{- $release := list $repository (printf "%s:*" $repository) (printf "%s@*" $repository) }}
{{- $single := list
  (list "images" "compute.image" (concat $release $limits.images))
  (list "serviceAccounts" "storage.serviceAccountName" $limits.serviceAccounts)
  (list "priorityClasses" "scheduling.priorityClassName" $limits.priorityClasses)
  (list "modelSources" "model.source" $limits.modelSources)
  (list "judgeEndpoints" "evaluation.judge.endpoint" $limits.judgeEndpoints) }}
{{- range $single }}
{{- $patterns := index . 2 }}
{{- if not (has "*" $patterns) }}
- name: {{ index . 0 }}
  allowed: {{ printf "%s (chart value admission.%s)" ($patterns | join ", " | default "none") (index . 0) | toJson }}
  faults: >-
    [object.spec.?{{ index . 1 }}.orValue('')].filter(v, v != ''
    && !({{ include "finetune-operator.matches" (dict "value" "v" "patterns" $patterns) }}))
    .map(v, 'spec.{{ index . 1 }}: ' + v)
{{- end }}
{{- end }}
- name: systemPriorityClasses
  allowed: classes that do not begin with system-
  faults: >-
    [object.spec.?scheduling.priorityClassName.orValue('')].filter(v, v.startsWith('system-'))
    .map(v, 'spec.scheduling.priorityClassName: ' + v)
{{- if not (has "*" $limits.storageEndpoints) }}
- name: storageEndpoints
  allowed: {{ printf "%s (chart value admission.storageEndpoints)" ($limits.storageEndpoints | join ", " | default "none") | toJson }}
  faults: >-
    {{ include "finetune-operator.endpointFaults" . }}
{{- end }}
- name: deniedTolerations
  allowed: {{ printf "keys other than %s (chart value admission.deniedTolerations)" (join ", " $limits.deniedTolerations) | toJson }}
  faults: >-
    {{ include "finetune-operator.tolerationFaults" . }}
{{- include "finetune-operator.podTemplateRules" . }}
{{- end }}

{{/* Rules for spec.compute.podTemplate. files/podtemplate.yaml has what the operator accepts. */}}
{{- define "finetune-operator.podTemplateRules" -}}
{{- $limits := .Values.admission }}
{{- $parts := .Files.Get "files/podtemplate.yaml" | fromYaml }}
{{- $root := "spec.compute.podTemplate" }}
{{- $container := printf "%s.spec.containers[]" $root }}
{{- $places := list
  (list "podTemplateFields" "variables.podTemplate" $root $parts.template)
  (list "podSpecFields" "variables.podSpec" (printf "%s.spec" $root) $parts.pod)
  (list "podSecurityContext" "variables.podSpec.?securityContext.orValue({})"
    (printf "%s.spec.securityContext" $root) $parts.podSecurityContext) }}
{{- range $places }}
- name: {{ index . 0 }}
  allowed: {{ index . 3 | join ", " }}
  faults: >-
    {{ include "finetune-operator.otherKeys" (dict "map" (index . 1) "path" (index . 2) "allowed" (index . 3)) }}
{{- end }}
{{- $ofEach := list
  (list "containerFields" "c" $container $parts.container)
  (list "containerSecurityContext" "c.?securityContext.orValue({})"
    (printf "%s.securityContext" $container) $parts.containerSecurityContext) }}
{{- range $ofEach }}
- name: {{ index . 0 }}
  allowed: {{ index . 3 | join ", " }}
  faults: >-
    variables.podSpec.?containers.orValue([]).map(c,
    {{ include "finetune-operator.otherKeys" (dict "map" (index . 1) "path" (index . 2) "allowed" (index . 3)) }}
    .join('; ')).filter(f, f != '')
{{- end }}
{{- $capabilities := ternary $parts.capabilities $limits.capabilities (has "*" $limits.capabilities) }}
- name: capabilities
  allowed: {{ $capabilities | join ", " | default "none" }} (chart value admission.capabilities)
  faults: >-
    variables.podSpec.?containers.orValue([]).map(c,
    c.?securityContext.capabilities.add.orValue([]).filter(v, !(v in {{ toJson $capabilities }}))
    .map(v, '{{ $container }}.securityContext.capabilities.add: ' + v)
    .join('; ')).filter(f, f != '')
{{- $types := ternary $parts.volume (append $limits.volumeTypes "name") (has "*" $limits.volumeTypes) }}
- name: volumeTypes
  allowed: {{ without $types "name" | join ", " | default "none" }} (chart value admission.volumeTypes)
  faults: >-
    variables.podSpec.?volumes.orValue([]).map(c,
    {{ include "finetune-operator.otherKeys" (dict "map" "c" "path" (printf "%s.spec.volumes[]" $root) "allowed" $types) }}
    .join('; ')).filter(f, f != '')
{{- end }}
