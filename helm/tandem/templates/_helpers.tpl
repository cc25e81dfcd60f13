{{/*
Names, labels, images, settings, and what every pod that runs Tandem has in common.

Helm reads numbers as floating point: an integer is printed by `int` or `toYaml`, never as it is. A 0 and a false count
as empty for `default`, `merge` and `mergeOverwrite`, so tables are joined by `set`, key by key.
*/}}

{{- define "tandem.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end }}

{{/* The release's own name where it says already what this is. _validate.tpl refuses one that is too long. */}}
{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := include "tandem.name" . -}}
{{- contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- end -}}
{{- end }}

{{- define "tandem.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/*
What selects pods: never changes in the life of a release. The labels of Ray's pods are these alone: a label that
changes with the chart's version would build a second Ray cluster at each upgrade.
Takes {context, component}.
*/}}
{{- define "tandem.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tandem.name" .context | quote }}
app.kubernetes.io/instance: {{ .context.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of everything but Ray's pods. Takes {context, component}. */}}
{{- define "tandem.labels" -}}
{{- $labels := include "tandem.selectorLabels" . | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "tandem" -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .context.Release.Service -}}
{{- $_ := set $labels "app.kubernetes.io/version" .context.Chart.AppVersion -}}
{{- $_ := set $labels "helm.sh/chart" (include "tandem.chart" .context) -}}
{{- range $key, $value := .context.Values.commonLabels -}}
{{- if not (hasKey $labels $key) -}}
{{- $_ := set $labels $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end }}

{{/* `annotations:` with `commonAnnotations` and the object's own, or nothing. Takes {context, own}. */}}
{{- define "tandem.annotations" -}}
{{- $all := dict -}}
{{- range $key, $value := .context.Values.commonAnnotations -}}
{{- $_ := set $all $key $value -}}
{{- end -}}
{{- range $key, $value := .own -}}
{{- $_ := set $all $key $value -}}
{{- end -}}
{{- with $all -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}

{{/* The image for nodes without a GPU (`cpu`) or with one (`cuda`). Takes {context, variant}. */}}
{{- define "tandem.image" -}}
{{- $image := .context.Values.image -}}
{{- printf "%s/%s:%s-%s" (trimSuffix "/" $image.registry) $image.repository
  ($image.tag | default .context.Chart.AppVersion) .variant -}}
{{- end }}

{{/* `imagePullSecrets:`, or nothing. */}}
{{- define "tandem.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end -}}
{{- end }}

{{/*
Service account of Ray's workers and of Jobs. The head has none of ours: KubeRay makes it one of its own, with the
rights that the autoscaler needs, and a worker shall not have those.
*/}}
{{- define "tandem.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "tandem.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{- define "tandem.podSecurityContext" -}}
{{- toYaml .Values.podSecurityContext -}}
{{- end }}

{{- define "tandem.containerSecurityContext" -}}
{{- toYaml .Values.containerSecurityContext -}}
{{- end }}

{{/* The service that KubeRay makes of `spec.serveService`, and its port. */}}
{{- define "tandem.serveService" -}}
{{- include "tandem.fullname" . }}-serve-svc
{{- end }}

{{- define "tandem.configMapName" -}}
{{- include "tandem.fullname" . }}-config
{{- end }}

{{- define "tandem.firstKey.secretName" -}}
{{- .Values.keys.existingSecret | default (printf "%s-first-key" (include "tandem.fullname" .)) -}}
{{- end }}

{{/* The Secret with `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`; nothing where boto3 looks by itself. */}}
{{- define "tandem.s3.secretName" -}}
{{- if .Values.s3.existingSecret -}}
{{- .Values.s3.existingSecret -}}
{{- else if or .Values.s3.trial.enabled .Values.s3.accessKeyId -}}
{{- include "tandem.fullname" . }}-s3
{{- end -}}
{{- end }}

{{- define "tandem.s3.bucket" -}}
{{- .Values.s3.bucket | default (ternary "tandem" "" .Values.s3.trial.enabled) -}}
{{- end }}

{{- define "tandem.s3.endpointUrl" -}}
{{- if .Values.s3.trial.enabled -}}
http://{{ include "tandem.fullname" . }}-s3-trial:5000
{{- else -}}
{{- .Values.s3.endpointUrl -}}
{{- end -}}
{{- end }}

{{/* "true" where the chart itself runs this Redis, `jobs`, `cache` or `gcs`, else nothing. Takes {context, which}. */}}
{{- define "tandem.redis.own" -}}
{{- $redis := index .context.Values.redis .which -}}
{{- if $redis.enabled -}}
{{- if eq .which "gcs" -}}
{{- if and .context.Values.ray.gcsFaultTolerance (not $redis.address) -}}true{{- end -}}
{{- else if not (or $redis.existingSecret $redis.url) -}}true{{- end -}}
{{- end -}}
{{- end }}

{{/* "true" where the chart runs any Redis itself: then there is a password. */}}
{{- define "tandem.redis.anyOwn" -}}
{{- range list "jobs" "cache" "gcs" -}}
{{- include "tandem.redis.own" (dict "context" $ "which" .) -}}
{{- end -}}
{{- end }}

{{/* Name of a Redis of ours and of its service. Takes {context, which}. */}}
{{- define "tandem.redis.name" -}}
{{- printf "%s-redis-%s" (include "tandem.fullname" .context) .which -}}
{{- end }}

{{/* The Secret whose `password` our own servers want. */}}
{{- define "tandem.redis.secretName" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "tandem.fullname" .)) -}}
{{- end }}

{{/* The Secret with URLs that were given inline: `jobs`, `cache`. */}}
{{- define "tandem.redis.urlsSecretName" -}}
{{- include "tandem.fullname" . }}-redis-urls
{{- end }}

{{/* host:port of the Redis that holds Ray's own state. */}}
{{- define "tandem.redis.gcsAddress" -}}
{{- .Values.redis.gcs.address | default (printf "%s:6379"
  (include "tandem.redis.name" (dict "context" . "which" "gcs"))) -}}
{{- end }}

{{/* The Secret with the password of that Redis; nothing where it has none. */}}
{{- define "tandem.redis.gcsSecretName" -}}
{{- if include "tandem.redis.own" (dict "context" . "which" "gcs") -}}
{{- include "tandem.redis.secretName" . -}}
{{- else -}}
{{- .Values.redis.gcs.existingSecret -}}
{{- end -}}
{{- end }}

{{/* One environment variable with a Redis URL, or nothing where there is none. Takes {context, which, name}. */}}
{{- define "tandem.redis.urlEnv" -}}
{{- $redis := index .context.Values.redis .which -}}
{{- if $redis.existingSecret -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ $redis.existingSecret }}
      key: url
{{- else if $redis.url -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ include "tandem.redis.urlsSecretName" .context }}
      key: {{ .which }}
{{- else if $redis.enabled -}}
- name: {{ .name }}
  value: redis://:$(OWN_REDIS_PASSWORD)@{{ include "tandem.redis.name" . }}:6379/0
{{- end -}}
{{- end }}

{{/*
Environment of anything that runs Tandem, without secrets: where the settings, the home and the model files are, and
`extraEnv`. No variable but a setting's may begin with TANDEM_: Tandem refuses others. Pods have `enableServiceLinks:
false` for the same reason: Kubernetes would name a service `tandem-redis-jobs` to them as TANDEM_REDIS_JOBS_PORT.
*/}}
{{- define "tandem.baseEnv" -}}
- name: TANDEM_CONFIG
  value: /etc/tandem/tandem.yaml
- name: HOME
  value: /home/tandem
- name: HF_HOME
  value: /data/hub
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
The same with the secrets of a server: what no `args` and no ConfigMap may hold. A variable is expanded in those below
it alone, so the password is before the URLs.
*/}}
{{- define "tandem.env" -}}
{{- $ownJobs := include "tandem.redis.own" (dict "context" . "which" "jobs") -}}
{{- $ownCache := include "tandem.redis.own" (dict "context" . "which" "cache") -}}
{{ include "tandem.baseEnv" . }}
{{- if or $ownJobs $ownCache }}
- name: OWN_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "tandem.redis.secretName" . }}
      key: password
{{- end }}
{{ include "tandem.redis.urlEnv" (dict "context" . "which" "jobs" "name" "TANDEM_JOBS__REDIS_URL") }}
{{- with include "tandem.redis.urlEnv" (dict "context" . "which" "cache" "name" "TANDEM_CACHE__REDIS_URL") }}
{{ . }}
{{- end }}
- name: TANDEM_KEYS__FIRST
  valueFrom:
    secretKeyRef:
      name: {{ include "tandem.firstKey.secretName" . }}
      key: key
{{- with .Values.webhooks.existingSecret }}
- name: TANDEM_WEBHOOKS__SECRET
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: secret
{{- end }}
{{- with .Values.tracing.existingSecret }}
- name: TANDEM_TRACING__HEADERS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: headers
{{- end }}
{{- $s3Secret := include "tandem.s3.secretName" . -}}
{{- if $s3Secret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ $s3Secret }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volumes of anything that runs Tandem: its root is read-only, and these are where it writes. */}}
{{- define "tandem.volumes" -}}
- name: config
  configMap:
    name: {{ include "tandem.configMapName" . }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.scratch.sizeLimit }}
- name: home
  emptyDir:
    sizeLimit: 1Gi
- name: data
{{- if .Values.weights.enabled }}
  persistentVolumeClaim:
    claimName: {{ include "tandem.weights.claimName" . }}
{{- else }}
  emptyDir:
    sizeLimit: {{ .Values.scratch.sizeLimit }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tandem.volumeMounts" -}}
- name: config
  mountPath: /etc/tandem
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/tandem
- name: data
  mountPath: /data
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tandem.weights.claimName" -}}
{{- .Values.weights.existingClaim | default (printf "%s-weights" (include "tandem.fullname" .)) -}}
{{- end }}

{{/*
The settings tree: `config` and what the chart knows by itself. It is the `args` of the Serve application and the file
/etc/tandem/tandem.yaml, and holds no secret.
*/}}
{{- define "tandem.settings" -}}
{{- $tree := deepCopy .Values.config -}}
{{- $results := $tree.results | default dict -}}
{{- $s3 := $results.s3 | default dict -}}
{{- $_ := set $s3 "bucket" (include "tandem.s3.bucket" .) -}}
{{- $_ := set $s3 "prefix" .Values.s3.prefix -}}
{{- with include "tandem.s3.endpointUrl" . -}}
{{- $_ := set $s3 "endpoint_url" . -}}
{{- end -}}
{{- with .Values.s3.region -}}
{{- $_ := set $s3 "region" . -}}
{{- end -}}
{{- $_ := set $s3 "presign" (and .Values.s3.presign (not .Values.s3.trial.enabled)) -}}
{{- $_ := set $results "store" "s3" -}}
{{- $_ := set $results "s3" $s3 -}}
{{- $_ := set $tree "results" $results -}}
{{- $_ := set $tree "data_dir" "/data" -}}
{{- toYaml $tree -}}
{{- end }}

{{/*
Seconds that a pod of Ray may take to go: the longest drain of any replica, and time to find them another place and to
put the last pictures.
*/}}
{{- define "tandem.drainSeconds" -}}
{{- $diffusion := .Values.config.diffusion | default dict -}}
{{- $own := hasKey $diffusion "drain_s" | ternary $diffusion.drain_s 120 -}}
{{- $http := .Values.config.http | default dict -}}
{{- $longest := maxf $own (hasKey $http "drain_s" | ternary $http.drain_s 5) -}}
{{- range $name, $placement := .Values.config.placements -}}
{{- $drain := hasKey $placement "drain_s" | ternary $placement.drain_s $own -}}
{{- $longest = maxf $longest $drain -}}
{{- end -}}
{{- ceil $longest | int -}}
{{- end }}

{{/* A worker group with `workerDefaults` under it, as YAML. Takes {context, group}. */}}
{{- define "tandem.group" -}}
{{- $merged := dict "gpus" 0 "gpuClass" "" "gpuMemoryMiB" dict -}}
{{- range $key, $value := .context.Values.workerDefaults -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- range $key, $value := .group -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end }}

{{/*
Which nodes a group's pods go to: what a pod spec has of it. GPU nodes are chosen by the memory of their card, where the
group says which, and by what else is given. Takes {group}, merged, and `nodes`: only what chooses the nodes.
*/}}
{{- define "tandem.group.scheduling" -}}
{{- $group := .group -}}
{{- $gpus := int $group.gpus -}}
{{- with $group.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := $group.tolerations | default list -}}
{{- if $gpus -}}
{{- $tolerations = prepend $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $affinity := include "tandem.group.affinity" . | fromYaml -}}
{{- with ternary (pick $affinity "nodeAffinity") $affinity (not (empty .nodes)) }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and $group.priorityClassName (not .nodes) }}
priorityClassName: {{ $group.priorityClassName }}
{{- end }}
{{- if and $gpus $group.runtimeClassName }}
runtimeClassName: {{ $group.runtimeClassName }}
{{- end }}
{{- end }}

{{/* The given affinity; what chooses by memory is added to each of its alternatives. Takes {group}, merged. */}}
{{- define "tandem.group.affinity" -}}
{{- $affinity := deepCopy (.group.affinity | default dict) -}}
{{- $memory := .group.gpuMemoryMiB | default dict -}}
{{- $wanted := list -}}
{{- if int .group.gpus -}}
{{- if hasKey $memory "gt" -}}
{{- $wanted = append $wanted (dict "key" "nvidia.com/gpu.memory" "operator" "Gt" "values"
  (list (int $memory.gt | toString))) -}}
{{- end -}}
{{- if hasKey $memory "lt" -}}
{{- $wanted = append $wanted (dict "key" "nvidia.com/gpu.memory" "operator" "Lt" "values"
  (list (int $memory.lt | toString))) -}}
{{- end -}}
{{- end -}}
{{- if $wanted -}}
{{- $node := $affinity.nodeAffinity | default dict -}}
{{- $required := $node.requiredDuringSchedulingIgnoredDuringExecution | default dict -}}
{{- $terms := list -}}
{{- range $term := $required.nodeSelectorTerms | default (list dict) -}}
{{- $terms = append $terms (set $term "matchExpressions" (concat ($term.matchExpressions | default list) $wanted)) -}}
{{- end -}}
{{- $_ := set $required "nodeSelectorTerms" $terms -}}
{{- $_ := set $node "requiredDuringSchedulingIgnoredDuringExecution" $required -}}
{{- $_ := set $affinity "nodeAffinity" $node -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end }}
