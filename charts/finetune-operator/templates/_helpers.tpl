{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "finetune-operator.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "finetune-operator.selector" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "finetune-operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "finetune-operator.serviceAccountName" -}}
{{- $default := ternary (include "finetune-operator.fullname" .) "default" .Values.serviceAccount.create }}
{{- default $default .Values.serviceAccount.name }}
{{- end }}

{{- define "finetune-operator.leaseName" -}}
{{- default (include "finetune-operator.fullname" .) .Values.leaderElection.leaseName }}
{{- end }}

{{/* Reference of an image, from a dict with image and root. */}}
{{- define "finetune-operator.image" -}}
{{- if .image.digest -}}
{{ printf "%s@%s" .image.repository .image.digest }}
{{- else -}}
{{ printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) }}
{{- end }}
{{- end }}

{{/* Settings of the runs' NetworkPolicies, for the operator's --network-policy. */}}
{{- define "finetune-operator.networkPolicy" -}}
{{- if .Values.networkPolicy.enabled -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) }}
{{- $pods := dict "matchLabels" (include "finetune-operator.selector" . | fromYaml) }}
{{- $operator := dict "namespaceSelector" $namespace "podSelector" $pods }}
{{- $from := prepend .Values.networkPolicy.metricsFrom $operator }}
{{- dict "metricsFrom" $from "egress" .Values.networkPolicy.egress | toJson }}
{{- else -}}
off
{{- end }}
{{- end }}

{{/* Rights of the operator in watched namespaces, for the requests of cluster.py and watch.py. */}}
{{- define "finetune-operator.rules" -}}
- apiGroups: [finetune-operator.dev]
  resources: [finetunejobs]
  verbs: [list, watch]
- apiGroups: [finetune-operator.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
# Children block the deletion of their job until they are deleted. Clusters with the admission
# plugin OwnerReferencesPermissionEnforcement require this right for that.
- apiGroups: [finetune-operator.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
# get: to recognize a child whose creation was not answered.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# Also to delete those that it has made, once networkPolicy.enabled is false.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
# Warnings about pods that do not start: the missing volume, the exceeded quota.
- apiGroups: [""]
  resources: [events]
  verbs: [list]
{{- end }}
