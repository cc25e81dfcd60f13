{{/*
What the schema can't say of the values: refused when they are rendered, not when a cluster has half of them. Every
template below prints lines `<path>: <what is wrong>; <the way out>`, or nothing; an indented line goes on with the one
before it.

KubeRay checks a RayService only after the API server has taken it (`ValidationFailed` in its status), so its rules are
here too.
*/}}
{{- define "tandem.validate" -}}
{{- $faults := list -}}
{{- range list "names" "required" "image" "config" "models" "secrets" "store" "redis" "weights" "sizes" "groups"
  "placements" "classes" "encoders" "fit" "upgrade" "doors" "environment" "pods" "ray" -}}
{{- range $line := include (printf "tandem.validate.%s" .) $ | splitList "\n" -}}
{{- if hasPrefix "  " $line -}}
{{- $faults = append (initial $faults) (printf "%s %s" (last $faults) (trim $line)) -}}
{{- else if trim $line -}}
{{- $faults = append $faults (printf "values: %s" (trim $line)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $faults -}}
{{- fail (printf "\n\n%s\n" (join "\n" (uniq $faults))) -}}
{{- end -}}
{{- end }}

{{/*
Null takes the chart's own values away, and a template that looks for them would end with Go's words and not ours. So
this is asked for by the file that Helm renders first: the last one of the deepest folder.
*/}}
{{- define "tandem.validate.given" -}}
{{- $faults := list -}}
{{- range $path := list "image" "image.registry" "config" "ray" "ray.version" "ray.tokenAuth" "ray.head"
  "ray.autoscaler" "ray.upgrade" "workerGroups" "workerDefaults" "serve" "service" "ingress" "gateway" "keys" "s3"
  "s3.trial" "s3.trial.enabled" "redis" "webhooks" "tracing" "weights" "scratch" "prePull" "serviceAccount"
  "networkPolicy" "podDisruptionBudget" "monitoring" "tests" "podSecurityContext" -}}
{{- $node := $.Values -}}
{{- $above := true -}}
{{- range $room := splitList "." $path -}}
{{- $above = not (kindIs "invalid" $node) -}}
{{- if $above -}}
{{- $node = index $node $room -}}
{{- end -}}
{{- end -}}
{{- if and $above (kindIs "invalid" $node) -}}
{{- $faults = append $faults (printf "values: %s: it is null; leave it out, or write something below it" $path) -}}
{{- end -}}
{{- end -}}
{{- if $faults -}}
{{- fail (printf "\n\n%s\n" (join "\n" $faults)) -}}
{{- end -}}
{{- end }}

{{- define "tandem.validate.names" -}}
{{- $name := include "tandem.fullname" . -}}
{{- $path := empty .Values.fullnameOverride | ternary
  (printf "fullnameOverride (by default from the release's name, %s)" .Release.Name) "fullnameOverride" -}}
{{- $most := 47 -}}
{{- $why := "KubeRay makes longer ones of it" -}}
{{- if include "tandem.redis.own" (dict "context" . "which" "gcs") -}}
{{- $most = 42 -}}
{{- end -}}
{{- if include "tandem.redis.own" (dict "context" . "which" "jobs") -}}
{{- $most = 41 -}}
{{- end -}}
{{- if lt $most 47 -}}
{{- $why = "the names of our own Redis, with a revision's hash, must fit into a label" -}}
{{- end -}}
{{- if gt (len $name) $most }}
{{ $path }}: {{ $name }} has {{ len $name }} characters, and at most {{ $most }} fit, because {{ $why }}; give a
  shorter one
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{ $path }}: {{ $name }} is no name for a service; take a-z, 0-9 and '-', a letter first, no '-' at the end
{{- end -}}
{{- end }}

{{- define "tandem.validate.required" -}}
{{- if gt (len (include "tandem.name" .)) 63 }}
nameOverride: it has {{ len (include "tandem.name" .) }} characters, and a label holds 63; give a shorter one
{{- end -}}
{{- if not .Values.image.registry }}
image.registry: it is empty; say which registry holds the image, such as ghcr.io/acme
{{- end -}}
{{- if not (include "tandem.s3.bucket" .) }}
s3.bucket: it is empty; name the bucket for the pictures, or try the server out with s3.trial.enabled
{{- end -}}
{{- end }}

{{- define "tandem.validate.image" -}}
{{- $image := .Values.image -}}
{{- if contains "://" $image.registry }}
image.registry: {{ $image.registry }} has a scheme; say {{ regexReplaceAll "^.*://" $image.registry "" }}
{{- end -}}
{{- with regexFind "-(cpu|cuda)$" $image.tag }}
image.tag: {{ $image.tag }} names one of the two images; say it without {{ . }}, which the chart adds
{{- end -}}
{{- end }}

{{- define "tandem.validate.config" -}}
{{- $single := "" -}}
{{- $head := .Values.ray.head -}}
{{- range $path, $wayOut := .Files.Get "files/not-in-config.yaml" | fromYaml -}}
{{- $node := $.Values.config -}}
{{- range $room := splitList "." $path -}}
{{- $node = kindIs "map" $node | ternary (get ($node | default dict) $room) "" -}}
{{- end -}}
{{- if not (or (kindIs "invalid" $node) (eq (toString $node) "")) }}
config.{{ $path }}: it can't be set here; {{ $wayOut }}
{{- end -}}
{{- end -}}
{{- $models := dict "model" .Values.config.model -}}
{{- range $list := list "models" "text_models" -}}
{{- range $index, $model := get $.Values.config $list | default list -}}
{{- $_ := set $models (printf "%s[%d]" $list $index) $model -}}
{{- end -}}
{{- end -}}
{{- range $path, $model := $models -}}
{{- $source := ($model | default dict).source | default "shapes" -}}
{{- if hasSuffix ".safetensors" $source -}}
{{- $single = $source -}}
{{- end -}}
{{- if and (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$" $source)
  (not (hasSuffix ".safetensors" $source)) -}}
{{- if not (regexMatch "^[0-9a-f]{40}$" ($model.revision | default "")) }}
config.{{ $path }}.revision: {{ $source }} is a hub id; give the full commit hash (40 hex digits), so that every
  replica loads the same weights
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* The head may be the one that converts it, and Ray's own state would go with it. */ -}}
{{- $memory := $head.memoryLimit | default $head.memory -}}
{{- if and $single (not (include "tandem.unitless" $memory))
  (lt (include "tandem.quantity" $memory | float64) 12884901888.0) }}
ray.head.memory: {{ $memory }}, and {{ $single }} may be converted there, which has it in memory as a whole; give the
  head 12Gi, or convert it beforehand and name the folder
{{- end -}}
{{- end }}

{{/*
The models that can be drawn, as {path, name}, as YAML: `config.model` and `config.models`, by the names that the server
gives them (serve/models/folder.py). `unsure` where it can't be told from the source. Texts alone: `texts`.
*/}}
{{- define "tandem.models" -}}
{{- $unsure := false -}}
{{- $found := dict "drawn" list "texts" list -}}
{{- $listed := list (list "drawn" "config.model" (.Values.config.model | default dict)) -}}
{{- range $list := list "models" "text_models" -}}
{{- range $index, $model := get $.Values.config $list | default list -}}
{{- $listed = append $listed (list (ternary "drawn" "texts" (eq $list "models")) (printf "config.%s[%d]" $list $index)
  $model) -}}
{{- end -}}
{{- end -}}
{{- range $listed -}}
{{- $model := index . 2 -}}
{{- $source := $model.source | default "shapes" -}}
{{- $name := $model.name | default (trimSuffix ".safetensors" (base $source)) -}}
{{- if or (has $name (list "" "." ".." "/")) (hasPrefix "~" $name) -}}
{{- $unsure = true -}}
{{- end -}}
{{- $kind := index . 0 -}}
{{- $_ := set $found $kind (append (get $found $kind) (dict "path" (index . 1) "name" $name)) -}}
{{- end -}}
{{- $_ := set $found "unsure" $unsure -}}
{{- toYaml $found -}}
{{- end }}

{{/* What serve/placements.py says of the models and placements, and serve/catalog.py of the names. */}}
{{- define "tandem.validate.models" -}}
{{- $models := include "tandem.models" . | fromYaml -}}
{{- if not $models.unsure -}}
{{- $names := list -}}
{{- range $model := concat $models.drawn $models.texts -}}
{{- if has $model.name $names }}
{{ $model.path }}.name: another model is called {{ $model.name }} too; give one of them a name of its own
{{- end -}}
{{- $names = append $names $model.name -}}
{{- end -}}
{{- $drawn := list -}}
{{- range $model := $models.drawn -}}
{{- $drawn = append $drawn $model.name -}}
{{- end -}}
{{- $diffusion := .Values.config.diffusion | default dict -}}
{{- $replicas := 0 -}}
{{- $most := dict -}}
{{- range $one := (include "tandem.placements" .| fromYaml).all -}}
{{- $replicas = int $one.most -}}
{{- $_ := set $most $one.name (int $one.most) -}}
{{- end -}}
{{- $used := list -}}
{{- $lost := false -}}
{{- range $name, $given := .Values.config.placements -}}
{{- $placement := $given | default dict -}}
{{- if get $most $name -}}
{{- $own := hasKey $placement "model" -}}
{{- $model := $own | ternary $placement.model $diffusion.model | default (first $drawn) -}}
{{- $used = append $used $model -}}
{{- if not (has $model $drawn) -}}
{{- $lost = true }}
config.{{ ternary (printf "placements.%s" $name) "diffusion" $own }}.model: there is no model {{ $model }}; config.model
  and config.models are {{ join ", " $drawn }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $used (not $lost) -}}
{{- range $model := $models.drawn -}}
{{- if not (has $model.name $used) }}
config.placements: none has replicas for the model {{ $model.name }}; give it one, or take it out of {{ $model.path }}
{{- end -}}
{{- end -}}
{{- else if and (not .Values.config.placements) $replicas (not (kindIs "invalid" $diffusion.model)) -}}
{{- if not (has $diffusion.model $drawn) }}
config.diffusion.model: there is no model {{ $diffusion.model }}; config.model and config.models are
  {{ join ", " $drawn }}
{{- else if gt (len $drawn) 1 }}
config.diffusion.model: without placements every model is drawn; say in config.placements what is drawn where
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Names of Secrets. What stands there may be the secret itself, so no message has it. */}}
{{- define "tandem.validate.secretNames" -}}
{{- $named := dict "keys.existingSecret" .Values.keys.existingSecret "s3.existingSecret" .Values.s3.existingSecret
  "webhooks.existingSecret" .Values.webhooks.existingSecret "redis.existingSecret" .Values.redis.existingSecret
  "tracing.existingSecret" .Values.tracing.existingSecret -}}
{{- range $which := list "jobs" "cache" "gcs" -}}
{{- with index $.Values.redis $which -}}
{{- $_ := set $named (printf "redis.%s.existingSecret" $which) .existingSecret -}}
{{- end -}}
{{- end -}}
{{- range $index, $name := .Values.image.pullSecrets -}}
{{- $_ := set $named (printf "image.pullSecrets[%d]" $index) $name -}}
{{- end -}}
{{- range $path, $name := $named -}}
{{- if and $name (or (gt (len $name) 253) (not (regexMatch (include "tandem.domain" .) $name))) }}
{{ $path }}: it is no name of a Secret (a-z, 0-9, '-' and '.'); put the value into a Secret, and say its name here
{{- end -}}
{{- end -}}
{{- end }}

{{/* What Kubernetes takes as a host's name, and as a name of most things. */}}
{{- define "tandem.domain" -}}
^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$
{{- end }}

{{- define "tandem.validate.store" -}}
{{- $s3 := .Values.s3 -}}
{{- $bucket := $s3.bucket | default "" -}}
{{- /* As boto3 has it. An access point is a bucket too, by its ARN. */ -}}
{{- if and $bucket (not (hasPrefix "arn:" $bucket)) (not (regexMatch "^[A-Za-z0-9._-]{1,255}$" $bucket)) }}
s3.bucket: {{ $bucket }} is no name of a bucket; say the name alone, and a folder in s3.prefix
{{- end -}}
{{- if and $s3.trial.enabled $bucket (or $s3.existingSecret $s3.accessKeyId $s3.secretAccessKey) }}
s3.trial.enabled: it keeps pictures in the memory of a pod, and s3.bucket and its credentials name a bucket of your own;
  leave one of the two out
{{- end -}}
{{- end }}

{{- define "tandem.validate.weights" -}}
{{- if and .Values.weights.existingClaim (not .Values.weights.enabled) }}
weights.existingClaim: weights.enabled is off, so no pod mounts {{ .Values.weights.existingClaim }}; switch it on, or
  leave this out
{{- end -}}
{{- end }}

{{/* "true" where a quantity has so few bytes that its unit was forgotten. Takes it. */}}
{{- define "tandem.unitless" -}}
{{- $given := toString . -}}
{{- if regexMatch "^[0-9.]+$" $given -}}
{{- if and (gt ($given | float64) 0.0) (lt ($given | float64) 1000000.0) -}}true{{- end -}}
{{- end -}}
{{- end }}

{{/* Of what this release has. */}}
{{- define "tandem.validate.sizes" -}}
{{- $ray := .Values.ray -}}
{{- $sizes := dict "ray.head.memory" $ray.head.memory "ray.head.memoryLimit" $ray.head.memoryLimit
  "ray.autoscaler.memory" $ray.autoscaler.memory "scratch.sizeLimit" .Values.scratch.sizeLimit -}}
{{- range $index, $given := .Values.workerGroups -}}
{{- $group := include "tandem.group" (dict "context" $ "group" $given) | fromYaml -}}
{{- range $key := list "memory" "memoryLimit" -}}
{{- $_ := set $sizes (printf "workerGroups[%d].%s" $index $key) (get $group $key) -}}
{{- end -}}
{{- end -}}
{{- range $which := list "jobs" "cache" "gcs" -}}
{{- if include "tandem.redis.own" (dict "context" $ "which" $which) -}}
{{- $redis := index $.Values.redis $which -}}
{{- range $key := list "memory" "storage" -}}
{{- $_ := set $sizes (printf "redis.%s.%s" $which $key) (get $redis $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.s3.trial.enabled -}}
{{- $_ := set $sizes "s3.trial.memory" .Values.s3.trial.memory -}}
{{- end -}}
{{- if and .Values.weights.enabled (not .Values.weights.existingClaim) -}}
{{- $_ := set $sizes "weights.size" .Values.weights.size -}}
{{- end -}}
{{- if include "tandem.hasPreload" . -}}
{{- $_ := set $sizes "weights.preload.memory" .Values.weights.preload.memory -}}
{{- end -}}
{{- range $path, $size := $sizes -}}
{{- if include "tandem.unitless" $size }}
{{ $path }}: {{ $size }} is {{ $size }} bytes; a unit is missing, such as {{ $size }}Gi
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tandem.validate.secrets" -}}
{{- include "tandem.validate.secretNames" . -}}
{{- $s3 := .Values.s3 -}}
{{- if and $s3.existingSecret (or $s3.accessKeyId $s3.secretAccessKey) }}
s3.existingSecret: s3.accessKeyId or s3.secretAccessKey is given as well; keep one of the two
{{- else if ne (empty $s3.accessKeyId) (empty $s3.secretAccessKey) }}
s3.{{ ternary "accessKeyId" "secretAccessKey" (empty $s3.accessKeyId) }}: it is empty, and the other half of the
  credentials is given; give both, or neither
{{- end -}}
{{- if and $s3.trial.enabled $s3.endpointUrl }}
s3.endpointUrl: s3.trial.enabled puts a store into the cluster, and pictures lie in one; leave one of the two out
{{- end -}}
{{- $hosts := (.Values.config.webhooks | default dict).allowed_hosts -}}
{{- if and $hosts (not .Values.webhooks.existingSecret) }}
webhooks.existingSecret: config.webhooks.allowed_hosts lists hosts, and calls must be signed; give a Secret whose
  `secret` is whsec_ and 24 to 64 bytes in base64
{{- end -}}
{{- end }}

{{- define "tandem.validate.redis" -}}
{{- range $which := list "jobs" "cache" -}}
{{- $redis := index $.Values.redis $which -}}
{{- if and $redis.existingSecret $redis.url }}
redis.{{ $which }}.existingSecret: redis.{{ $which }}.url is given as well; keep one of the two
{{- end -}}
{{- end -}}
{{- $jobs := .Values.redis.jobs -}}
{{- if not (or $jobs.enabled $jobs.existingSecret $jobs.url) }}
redis.jobs.enabled: it is off, and there is no other Redis for the queue; give redis.jobs.existingSecret, or switch it
  on
{{- end -}}
{{- $cache := .Values.redis.cache | default dict -}}
{{- if not (or $cache.enabled $cache.existingSecret $cache.url) }}
redis.cache.enabled: it is off, and there is no other Redis for the embeddings, which all replicas share; give
  redis.cache.existingSecret or redis.cache.url, or switch it on
{{- end -}}
{{- $gcs := .Values.redis.gcs -}}
{{- if and .Values.ray.gcsFaultTolerance (not $gcs.enabled) (not $gcs.address) }}
redis.gcs.enabled: it is off, and ray.gcsFaultTolerance needs a Redis; give redis.gcs.address, switch it on, or switch
  ray.gcsFaultTolerance off
{{- end -}}
{{- if and $gcs.username (not $gcs.address) }}
redis.gcs.username: it opens the Redis of redis.gcs.address, which is empty; give that too, or leave this out
{{- end -}}
{{- if and $gcs.existingSecret (not $gcs.address) }}
redis.gcs.existingSecret: it opens the Redis of redis.gcs.address, which is empty; give that too, or say the password
  of our own in redis.existingSecret
{{- end -}}
{{- end }}

{{- define "tandem.validate.groups" -}}
{{- $seen := dict -}}
{{- range $index, $given := .Values.workerGroups -}}
{{- $path := printf "workerGroups[%d]" $index -}}
{{- $group := include "tandem.group" (dict "context" $ "group" $given) | fromYaml -}}
{{- $memory := $group.gpuMemoryMiB | default dict -}}
{{- $gpus := int $group.gpus -}}
{{- if hasKey $seen $group.name }}
{{ $path }}.name: workerGroups[{{ get $seen $group.name }}] is called {{ $group.name }} too; every group needs a name
  of its own
{{- end -}}
{{- $_ := set $seen $group.name (toString $index) -}}
{{- if or (gt (len $group.name) 55) (not (regexMatch "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" $group.name)) }}
{{ $path }}.name: {{ $group.name }} does not fit into the labels of its pods; take at most 55 of a-z, 0-9 and '-', no
  '-' at either end
{{- end -}}
{{- if eq $group.name "headgroup" }}
{{ $path }}.name: headgroup is what Ray calls the head; take another name
{{- end -}}
{{- if gt (int $group.min) (int $group.max) }}
{{ $path }}.min: it is {{ int $group.min }}, and max is {{ int $group.max }}; raise max or lower min
{{- end -}}
{{- if and $group.gpuClass (not (hasKey ($.Values.config.gpu_classes | default dict) $group.gpuClass)) }}
{{ $path }}.gpuClass: config.gpu_classes has no {{ $group.gpuClass }}, only
  {{ keys ($.Values.config.gpu_classes | default dict) | sortAlpha | join ", " }}; add it there, or name one of those
{{- end -}}
{{- if and $group.gpuClass (not (regexMatch "^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
  (include "tandem.classLabel" (dict "context" $ "gpuClass" $group.gpuClass)))) }}
{{ $path }}.gpuClass: {{ $group.gpuClass }} is no value for a label; give the class a `label` in config.gpu_classes
{{- end -}}
{{- /* A bound of 1 or less is one that every card passes, or none. */ -}}
{{- range $bound := list "gt" "lt" -}}
{{- $mib := get $memory $bound | int -}}
{{- if and (gt $mib 1) (lt $mib 512) }}
{{ $path }}.gpuMemoryMiB.{{ $bound }}: {{ $mib }} MiB is no card; the unit is MiB, {{ $mib }} GB is {{ mul $mib 1024 }}
{{- end -}}
{{- end -}}
{{- if and $gpus (ge (get $memory "lt" | int) 512) -}}
{{- with get ($.Values.config.gpu_classes | default dict) $group.gpuClass -}}
{{- /* A replica refuses a card with less than 0.95 of what its class has (serve/devices.py). */ -}}
{{- if lt (mulf (sub (int $memory.lt) 1) 0.001048576) (mulf .memory_gb 0.95) }}
{{ $path }}.gpuMemoryMiB.lt: no card below {{ int $memory.lt }} MiB has the {{ .memory_gb }} GB of
  config.gpu_classes.{{ $group.gpuClass }}; raise lt, or give the group the class of its cards
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (hasKey $memory "gt") (hasKey $memory "lt") -}}
{{- if ge (int $memory.gt) (int $memory.lt) }}
{{ $path }}.gpuMemoryMiB: no card has more than {{ int $memory.gt }} and less than {{ int $memory.lt }} MiB; gt must be
  below lt
{{- end -}}
{{- end -}}
{{- if and $memory (not $gpus) }}
{{ $path }}.gpuMemoryMiB: the group has no GPU; set gpus to 1, or leave it out
{{- end -}}
{{- if and $gpus (not (or $memory $group.nodeSelector $group.affinity)) }}
{{ $path }}.gpuMemoryMiB: nothing says which cards the group's pods are for; give gt and lt, or a nodeSelector
{{- end -}}
{{- if and $group.memoryLimit (not (include "tandem.unitless" $group.memoryLimit))
  (lt (include "tandem.quantity" $group.memoryLimit | float64)
  (include "tandem.quantity" $group.memory | float64)) }}
{{ $path }}.memoryLimit: {{ $group.memoryLimit }} is less than memory, {{ $group.memory }}; raise it, or leave it out
{{- end -}}
{{- $shm := include "tandem.quantity" $group.shm | float64 -}}
{{- if and (not (include "tandem.unitless" $group.memory)) (or (lt $shm 104857600.0)
  (ge $shm (include "tandem.quantity" $group.memory | float64))) }}
{{ $path }}.shm: {{ $group.shm }} of shared memory, which counts as memory ({{ $group.memory }}); take at least 100Mi,
  and less than memory
{{- end -}}
{{- end -}}
{{- $head := .Values.ray.head -}}
{{- if and $head.memoryLimit (not (include "tandem.unitless" $head.memoryLimit))
  (lt (include "tandem.quantity" $head.memoryLimit | float64)
  (include "tandem.quantity" $head.memory | float64)) }}
ray.head.memoryLimit: {{ $head.memoryLimit }} is less than memory, {{ $head.memory }}; raise it, or leave it out
{{- end -}}
{{- $shm := include "tandem.quantity" $head.shm | float64 -}}
{{- if and (not (include "tandem.unitless" $head.memory)) (or (lt $shm 104857600.0)
  (ge $shm (include "tandem.quantity" $head.memory | float64))) }}
ray.head.shm: {{ $head.shm }} of shared memory, which counts as memory ({{ $head.memory }}); take at least 100Mi, and
  less than memory
{{- end -}}
{{- end }}

{{/*
Every placement as {name, path, num_gpus, num_cpus, replicas, least, most, count, gpu_class, device}, `diffusion` under
it, as YAML: what the server makes of them (serve/settings, serve/placements.py). `count` is the setting that says
how many replicas there are at `most`.
*/}}
{{- define "tandem.placements" -}}
{{- $defaults := dict "num_gpus" 0 "num_cpus" 0.5 "replicas" 1 "gpu_class" "" "device" "auto"
  "min_replicas" "" "max_replicas" "" -}}
{{- $diffusion := .Values.config.diffusion | default dict -}}
{{- $all := list -}}
{{- $placements := .Values.config.placements | default dict -}}
{{- range $name, $placement := $placements | empty | ternary (dict "" dict) $placements -}}
{{- $one := dict "name" $name "path" (ternary (printf "config.placements.%s" $name) "config.diffusion" (ne $name "")) -}}
{{- range $key, $value := $defaults -}}
{{- range $from := list $diffusion ($placement | default dict) -}}
{{- if hasKey $from $key -}}
{{- $value = kindIs "invalid" (get $from $key) | ternary (get $defaults $key) (get $from $key) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $one $key $value -}}
{{- end -}}
{{- $open := eq (toString $one.max_replicas) "" -}}
{{- $_ := set $one "count" (ternary "replicas" "max_replicas" $open) -}}
{{- $_ := set $one "most" (ternary $one.replicas $one.max_replicas $open) -}}
{{- $_ := set $one "least" (ternary $one.replicas $one.min_replicas (eq (toString $one.min_replicas) "")) -}}
{{- $all = append $all $one -}}
{{- end -}}
{{- dict "all" $all | toYaml -}}
{{- end }}

{{- define "tandem.validate.placements" -}}
{{- range $one := (include "tandem.placements" . | fromYaml).all -}}
{{- if or (gt (int $one.least) (int $one.replicas)) (gt (int $one.replicas) (int $one.most)) }}
{{ $one.path }}.replicas: {{ int $one.replicas }} is how many there are at the start, which is not between min_replicas,
  {{ int $one.least }}, and max_replicas, {{ int $one.most }}; say all three
{{- end -}}
{{- if and $one.most (gt ($one.num_gpus | float64) 1.0) }}
{{ $one.path }}.num_gpus: {{ $one.num_gpus }} of one card; a denoiser runs on one, so say 1, or a share of one
{{- end -}}
{{- end -}}
{{- end }}

{{/* The classes, and those that placements and encoders name. */}}
{{- define "tandem.validate.classes" -}}
{{- $classes := .Values.config.gpu_classes | default dict -}}
{{- range $name, $class := $classes -}}
{{- with ($class | default dict).memory_gb -}}
{{- if gt (float64 .) 1024.0 }}
config.gpu_classes.{{ $name }}.memory_gb: {{ printf "%.0f" (float64 .) }} GB is no card; the unit is GB, and
  {{ printf "%.0f" (float64 .) }} MiB are {{ round (divf . 953.67431640625) 1 }} GB
{{- end -}}
{{- end -}}
{{- end -}}
{{- $labels := dict -}}
{{- range $group := .Values.workerGroups -}}
{{- with $group.gpuClass -}}
{{- $_ := set $labels (include "tandem.classLabel" (dict "context" $ "gpuClass" .)) true -}}
{{- end -}}
{{- end -}}
{{- range $one := concat (include "tandem.placements" . | fromYaml).all (include "tandem.encoders" . | fromYaml).all -}}
{{- if (hasKey $one "most" | ternary $one.most true) -}}
{{- with $one.gpu_class -}}
{{- if not (hasKey $classes .) }}
{{ $one.path }}.gpu_class: config.gpu_classes has no {{ . }}, only {{ keys $classes | sortAlpha | join ", " }}; add it
  there, or name one of those
{{- else if not (hasKey $labels (include "tandem.classLabel" (dict "context" $ "gpuClass" .))) }}
{{ $one.path }}.gpu_class: no worker group has gpuClass {{ . }}; add a group to workerGroups, or name a class that has
  one
{{- end -}}
{{- if and (not $one.num_gpus) (has $one.device (list "auto" "cuda")) }}
{{ $one.path }}.num_gpus: it is 0, and {{ . }} is a class of GPUs; say 1, or which share of one
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* `encoder`, and every entry of `encoders` over it, as {path, gpu_class, device, num_gpus, num_cpus,
min_replicas, max_replicas}; `captions` too where a model is named. */}}
{{- define "tandem.encoders" -}}
{{- $defaults := dict "gpu_class" "" "device" "auto" "num_gpus" 0 "num_cpus" 0.2 "min_replicas" 1 "max_replicas" 1 -}}
{{- $base := .Values.config.encoder | default dict -}}
{{- $all := list -}}
{{- $named := .Values.config.encoders | default dict -}}
{{- range $name, $encoder := merge (dict "" dict) $named -}}
{{- $one := dict "name" $name "path" (ternary (printf "config.encoders.%s" $name) "config.encoder" (ne $name "")) -}}
{{- range $key, $value := $defaults -}}
{{- range $from := list $base ($encoder | default dict) -}}
{{- if hasKey $from $key -}}
{{- $value = kindIs "invalid" (get $from $key) | ternary (get $defaults $key) (get $from $key) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $one $key $value -}}
{{- end -}}
{{- $all = append $all $one -}}
{{- end -}}
{{- $captions := .Values.config.captions | default dict -}}
{{- if $captions.source -}}
{{- $one := dict "name" "captions" "path" "config.captions" -}}
{{- range $key, $value := merge (dict "num_cpus" 0.5) $defaults -}}
{{- if hasKey $captions $key -}}
{{- $value = kindIs "invalid" (get $captions $key) | ternary $value (get $captions $key) -}}
{{- end -}}
{{- $_ := set $one $key $value -}}
{{- end -}}
{{- $all = append $all $one -}}
{{- end -}}
{{- dict "all" $all | toYaml -}}
{{- end }}

{{- define "tandem.validate.encoders" -}}
{{- range $one := (include "tandem.encoders" . | fromYaml).all -}}
{{- if gt (int $one.min_replicas) (int $one.max_replicas) }}
{{ $one.path }}.min_replicas: it is {{ int $one.min_replicas }}, and max_replicas is {{ int $one.max_replicas }}; raise
  max_replicas or lower min_replicas
{{- end -}}
{{- if and (gt ($one.num_gpus | float64) 1.0) (ne ($one.num_gpus | float64) (floor $one.num_gpus)) }}
{{ $one.path }}.num_gpus: {{ $one.num_gpus }}; above 1 it must be whole
{{- end -}}
{{- end -}}
{{- end }}

{{/*
Whether the most replicas fit on the worker groups at their `max`, shares of cards and CPUs both. Ray counts a pod's
CPUs rounded up to whole ones, and a share in ten-thousandths. Largest first, each into the first pod that holds it, what is
bound to a class before what is not.

Of the encoders those are counted that `config.encoders` names, by their `min_replicas`: which others there are, the
models say. For those, one replica must fit somewhere.
*/}}
{{- define "tandem.validate.fit" -}}
{{- $groups := list -}}
{{- range $index, $given := .Values.workerGroups -}}
{{- $group := include "tandem.group" (dict "context" $ "group" $given) | fromYaml -}}
{{- $label := "" -}}
{{- with $group.gpuClass -}}
{{- $label = include "tandem.classLabel" (dict "context" $ "gpuClass" .) -}}
{{- end -}}
{{- $cpus := include "tandem.quantity" $group.cpu | float64 | ceil | int -}}
{{- $groups = append $groups (dict "label" $label "gpus" (int $group.gpus) "cpu" (mul $cpus 10000 | int) "left"
  (int $group.max) "max" (int $group.max) "name" $group.name "path" (printf "workerGroups[%d].max" $index)) -}}
{{- end -}}
{{- $wishes := list -}}
{{- range $one := (include "tandem.placements" . | fromYaml).all -}}
{{- $label := "" -}}
{{- with $one.gpu_class -}}
{{- $label = include "tandem.classLabel" (dict "context" $ "gpuClass" .) -}}
{{- end -}}
{{- $wishes = append $wishes (dict "path" $one.path "count" $one.count "replicas" (int $one.most) "label" $label
  "num_gpus" $one.num_gpus "num_cpus" $one.num_cpus) -}}
{{- end -}}
{{- range $one := (include "tandem.encoders" . | fromYaml).all -}}
{{- $label := "" -}}
{{- with $one.gpu_class -}}
{{- $label = include "tandem.classLabel" (dict "context" $ "gpuClass" .) -}}
{{- end -}}
{{- $wishes = append $wishes (dict "path" $one.path "count" "min_replicas" "replicas"
  (ternary (int $one.min_replicas) 0 (ne $one.name "")) "label" $label "num_gpus" $one.num_gpus "num_cpus" $one.num_cpus
  "once" true) -}}
{{- end -}}
{{- $http := .Values.config.http | default dict -}}
{{- $wishes = append $wishes (dict "path" "config.http" "count" "replicas" "replicas"
  (hasKey $http "replicas" | ternary (int $http.replicas) 1) "label" "" "num_gpus" 0 "num_cpus"
  (hasKey $http "num_cpus" | ternary $http.num_cpus 0.2)) -}}
{{- $sorted := dict -}}
{{- range $index, $wish := $wishes -}}
{{- $gpu := round (mulf $wish.num_gpus 10000) 0 | int -}}
{{- $cpu := round (mulf $wish.num_cpus 10000) 0 | int -}}
{{- $_ := set $wish "gpu" $gpu -}}
{{- $_ := set $wish "cpu" $cpu -}}
{{- $_ := set $sorted (printf "%d %010d %010d %06d" (ternary 1 0 (empty $wish.label)) (sub 1000000000 $gpu)
  (sub 1000000000 $cpu) $index) $wish -}}
{{- end -}}
{{- $open := list -}}
{{- range $key := keys $sorted | sortAlpha -}}
{{- $wish := get $sorted $key -}}
{{- /* A wish that no pod could ever hold is told apart from one for which there are too few. */ -}}
{{- $hopeless := true -}}
{{- $hasCpu := false -}}
{{- range $group := $groups -}}
{{- if and (or (empty $wish.label) (eq $wish.label $group.label)) (ge (mul $group.gpus 10000) $wish.gpu) -}}
{{- if ge $group.cpu $wish.cpu -}}
{{- $hopeless = false -}}
{{- else -}}
{{- $hasCpu = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $classless := empty $wish.label -}}
{{- $known := $classless -}}
{{- range $group := $groups -}}
{{- $known = or $known (eq $wish.label $group.label) -}}
{{- end -}}
{{- if and $hopeless $known (or $wish.replicas $wish.once) -}}
{{- if $hasCpu }}
{{ $wish.path }}.num_cpus: one replica wants {{ $wish.num_cpus }} CPUs, more than a pod of any worker
  group{{ if not $classless }} of its class{{ end }} has; give the group more `cpu`, or the replica less
{{- else if gt $wish.gpu 0 -}}
{{- if or $classless $wish.once (le $wish.gpu 10000) }}
{{ $wish.path }}.num_gpus: one replica wants {{ $wish.num_gpus }} GPUs, and no worker group{{ if not $classless }} of
  its class{{ end }} has pods with so many; give a group more `gpus`, or the replica less
{{- end -}}
{{- end -}}
{{- else if and $known (or $classless $wish.once (le $wish.gpu 10000)) -}}
{{- $placed := 0 -}}
{{- $full := false -}}
{{- range $number := until (int $wish.replicas) -}}
{{- if not $full -}}
{{- $found := false -}}
{{- range $node := $open -}}
{{- if and (not $found) (or $classless (eq $node.label $wish.label)) (ge $node.cpu $wish.cpu) -}}
{{- if include "tandem.fit.take" (dict "node" $node "gpu" $wish.gpu) -}}
{{- $_ := set $node "cpu" (sub $node.cpu $wish.cpu | int) -}}
{{- $found = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $group := $groups -}}
{{- if and (not $found) (gt $group.left 0) (or $classless (eq $group.label $wish.label)) (ge $group.cpu $wish.cpu)
  (ge (mul $group.gpus 10000) $wish.gpu) -}}
{{- $cards := list -}}
{{- range until $group.gpus -}}
{{- $cards = append $cards 10000 -}}
{{- end -}}
{{- $node := dict "label" $group.label "cards" $cards "cpu" (sub $group.cpu $wish.cpu | int) -}}
{{- $_ := set $group "left" (sub $group.left 1 | int) -}}
{{- $_ := include "tandem.fit.take" (dict "node" $node "gpu" $wish.gpu) -}}
{{- $open = append $open $node -}}
{{- $found = true -}}
{{- end -}}
{{- end -}}
{{- if $found -}}
{{- $placed = add1 $placed -}}
{{- else -}}
{{- $full = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $full }}
{{- $raise := list -}}
{{- range $group := $groups -}}
{{- if and (or $classless (eq $group.label $wish.label)) (ge $group.cpu $wish.cpu) (ge (mul $group.gpus 10000) $wish.gpu)
  (or $wish.gpu (not $group.gpus)) -}}
{{- $raise = append $raise (printf "`%s` (%s, now %d)" $group.path $group.name $group.max) -}}
{{- end -}}
{{- end }}
{{ $wish.path }}.{{ $wish.count }}: {{ $wish.replicas }} replicas of {{ $wish.num_gpus }} GPU and {{ $wish.num_cpus }}
  CPUs each, and {{ $placed }} of them fit on the worker groups{{ if not $classless }} of class
  {{ $wish.label }}{{ end }} at their `max`, beside the others; raise {{ join " or " $raise | default "a group's `max`" }},
  or lower replicas or shares
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* "true" where the pod's cards hold so many ten-thousandths more, which it then has given. Takes {node, gpu}. */}}
{{- define "tandem.fit.take" -}}
{{- $wanted := .gpu -}}
{{- $whole := gt $wanted 10000 -}}
{{- $cards := list -}}
{{- range $free := .node.cards -}}
{{- $give := 0 -}}
{{- if gt $wanted 0 -}}
{{- if $whole -}}
{{- $give = ternary 10000 0 (eq $free 10000) -}}
{{- else if ge $free $wanted -}}
{{- $give = $wanted -}}
{{- end -}}
{{- end -}}
{{- $wanted = sub $wanted $give | int -}}
{{- $cards = append $cards (sub $free $give | int) -}}
{{- end -}}
{{- if le $wanted 0 -}}
{{- $_ := set .node "cards" $cards -}}
true
{{- end -}}
{{- end }}

{{- define "tandem.validate.upgrade" -}}
{{- $upgrade := .Values.ray.upgrade -}}
{{- $drain := include "tandem.drainSeconds" . | int -}}
{{- if le (int $upgrade.deletionDelaySeconds) $drain }}
ray.upgrade.deletionDelaySeconds: {{ int $upgrade.deletionDelaySeconds }} s, and a replica may drain for {{ $drain }} s
  (drain_s of config.diffusion, config.placements and config.http); make it longer than that
{{- end -}}
{{- if eq $upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not $upgrade.gatewayClassName }}
ray.upgrade.gatewayClassName: it is empty, and KubeRay makes a Gateway for an incremental upgrade; name a GatewayClass
  of the cluster
{{- end -}}
{{- if gt (int $upgrade.stepSizePercent) (int $upgrade.maxSurgePercent) }}
ray.upgrade.stepSizePercent: {{ int $upgrade.stepSizePercent }} is more than maxSurgePercent,
  {{ int $upgrade.maxSurgePercent }}; traffic can't move in larger steps than the new cluster grows
{{- end -}}
{{- range list "ingress" "gateway" -}}
{{- if (get $.Values .).enabled }}
{{ . }}.enabled: with ray.upgrade.type NewClusterWithIncrementalUpgrade KubeRay makes a Gateway and a route of its own,
  and no service that could stand behind this; switch it off
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tandem.validate.doors" -}}
{{- if and .Values.gateway.enabled (gt (int .Values.serve.requestTimeoutSeconds) 99999) }}
serve.requestTimeoutSeconds: {{ int .Values.serve.requestTimeoutSeconds }} s have six digits, and a route's time-out
  five; take at most 99999, or leave gateway.enabled off
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.operatorNamespace) }}
networkPolicy.operatorNamespace: it is empty, and the KubeRay operator must reach Ray's head; say where it runs
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}
gateway.parentRefs: it is empty, so that no Gateway takes the route; name one
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
ingress.hosts: it is empty; name the hosts under which the server is reached
{{- end -}}
{{- $domain := include "tandem.domain" . -}}
{{- range $path, $hosts := dict "ingress.hosts" .Values.ingress.hosts "gateway.hostnames" .Values.gateway.hostnames -}}
{{- range $index, $host := $hosts -}}
{{- if and $host (or (gt (len $host) 253) (not (regexMatch $domain (trimPrefix "*." $host)))) }}
{{ $path }}[{{ $index }}]: {{ $host }} is no host's name; say it as images.example.com, without scheme, port and path
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $path, $ranges := dict "networkPolicy.apiServerCidrs" .Values.networkPolicy.apiServerCidrs
  "service.loadBalancerSourceRanges" .Values.service.loadBalancerSourceRanges -}}
{{- range $index, $range := $ranges -}}
{{- if not (regexMatch "^[0-9a-fA-F:.]+/[0-9]+$" (trim $range)) }}
{{ $path }}[{{ $index }}]: {{ $range }} is no range of addresses; one address alone is 10.0.0.1/32
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.service.loadBalancerSourceRanges (ne .Values.service.type "LoadBalancer") }}
service.loadBalancerSourceRanges: service.type is {{ .Values.service.type }}, which has no load balancer; take
  networkPolicy.clients, or type LoadBalancer
{{- end -}}
{{- end }}

{{/*
Names that the chart or KubeRay gives: given twice, the later one would win unseen, or KubeRay refuses the cluster.
*/}}
{{- define "tandem.validate.environment" -}}
{{- $lists := dict "extraEnv" .Values.extraEnv "workerDefaults.extraEnv" .Values.workerDefaults.extraEnv -}}
{{- range $index, $group := .Values.workerGroups -}}
{{- $_ := set $lists (printf "workerGroups[%d].extraEnv" $index) ($group.extraEnv | default list) -}}
{{- end -}}
{{- $taken := list "HOME" "HF_HOME" "OWN_REDIS_PASSWORD" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_REDIS_ADDRESS"
  "RAY_ADDRESS" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_enable_autoscaler_v2" "RAY_external_storage_namespace"
  "RAY_USAGE_STATS_ENABLED" "RAY_USAGE_STATS_EXTRA_TAGS" "RAY_CLUSTER_NAME" "RAY_CLUSTER_NAMESPACE"
  "RAY_CLOUD_INSTANCE_ID" "RAY_NODE_TYPE_NAME" "RAY_IP" "FQ_RAY_IP" "KUBERAY_GEN_RAY_START_CMD" -}}
{{- if include "tandem.s3.secretName" . -}}
{{- $taken = concat $taken (list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY") -}}
{{- end -}}
{{- range $path, $list := $lists -}}
{{- $seen := list -}}
{{- range $index, $one := $list -}}
{{- if has $one.name $seen }}
{{ $path }}[{{ $index }}].name: {{ $one.name }} is there twice; keep one of the two
{{- end -}}
{{- $seen = append $seen $one.name -}}
{{- if hasPrefix "TANDEM_" $one.name }}
{{ $path }}[{{ $index }}].name: {{ $one.name }} is a setting; say it in config, or, if it is secret, in the existing
  Secret for it
{{- else if has $one.name $taken }}
{{ $path }}[{{ $index }}].name: {{ $one.name }} is set by the chart or by KubeRay; leave it out
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
Volumes, mounts, constraints and labels of Ray's pods. Of what Kubernetes wants unique it says only in the RayService's
events that it is not, and labels that others select by would take the pods away from the policies.
*/}}
{{- define "tandem.validate.pods" -}}
{{- /* The first is the head, with what all pods have. */ -}}
{{- range $number, $given := concat (list dict) (.Values.workerGroups | default list) -}}
{{- $volumes := list "config" "tmp" "home" "data" "shm" -}}
{{- $mounts := list "/etc/tandem" "/tmp" "/home/tandem" "/data" "/dev/shm" -}}
{{- $volumeLists := list (list "extraVolumes" $.Values.extraVolumes) -}}
{{- $mountLists := list (list "extraVolumeMounts" $.Values.extraVolumeMounts) -}}
{{- $labelLists := list (list "ray.head.labels" $.Values.ray.head.labels) -}}
{{- if $number -}}
{{- $group := include "tandem.group" (dict "context" $ "group" $given) | fromYaml -}}
{{- $room := dict -}}
{{- range $key := list "extraVolumes" "extraVolumeMounts" "labels" "topologySpreadConstraints" -}}
{{- $_ := set $room $key (printf "%s.%s" (hasKey $given $key | ternary (printf "workerGroups[%d]" (sub $number 1))
  "workerDefaults") $key) -}}
{{- end -}}
{{- $volumeLists = append $volumeLists (list $room.extraVolumes $group.extraVolumes) -}}
{{- $mountLists = append $mountLists (list $room.extraVolumeMounts $group.extraVolumeMounts) -}}
{{- $labelLists = list (list $room.labels $group.labels) -}}
{{- $seen := list -}}
{{- range $index, $one := $group.topologySpreadConstraints -}}
{{- $key := printf "%s %s" $one.topologyKey $one.whenUnsatisfiable -}}
{{- if has $key $seen }}
{{ $room.topologySpreadConstraints }}[{{ $index }}]: {{ $one.topologyKey }} with {{ $one.whenUnsatisfiable }} is there
  twice; keep one of the two
{{- end -}}
{{- $seen = append $seen $key -}}
{{- end -}}
{{- else -}}
{{- $volumes = append $volumes "ray-logs" -}}
{{- $mounts = append $mounts "/tmp/ray" -}}
{{- end -}}
{{- range $volumeLists -}}
{{- $path := index . 0 -}}
{{- range $index, $one := index . 1 -}}
{{- if has $one.name $volumes }}
{{ $path }}[{{ $index }}].name: the pods have a volume {{ $one.name }} already; call it something else
{{- end -}}
{{- $volumes = append $volumes $one.name -}}
{{- end -}}
{{- end -}}
{{- range $mountLists -}}
{{- $path := index . 0 -}}
{{- range $index, $one := index . 1 -}}
{{- $at := clean (toString $one.mountPath) -}}
{{- if has $at $mounts }}
{{ $path }}[{{ $index }}].mountPath: something is mounted at {{ $at }} already; take another path
{{- end -}}
{{- $mounts = append $mounts $at -}}
{{- if not (has $one.name $volumes) }}
{{ $path }}[{{ $index }}].name: there is no volume {{ $one.name }} in these pods; add it to extraVolumes
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $labelLists -}}
{{- $path := index . 0 -}}
{{- range $key, $_ := index . 1 -}}
{{- if or (hasPrefix "ray.io/" $key) (has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance"
  "app.kubernetes.io/component")) }}
{{ $path }}: services, policies and budgets find the pods by {{ $key }}, which the chart and KubeRay set; leave it out
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tandem.validate.ray" -}}
{{- if and .Values.ray.tokenAuth (not (semverCompare ">=2.52.0-0" .Values.ray.version)) }}
ray.tokenAuth: Ray {{ .Values.ray.version }} has no tokens, 2.52.0 is the first that has; take a newer image, or switch
  it off
{{- end -}}
{{- range $index, $given := .Values.workerGroups -}}
{{- $group := include "tandem.group" (dict "context" $ "group" $given) | fromYaml -}}
{{- if and (int $group.priority) (not (semverCompare ">=2.56.0-0" $.Values.ray.version)) }}
workerGroups[{{ $index }}].priority: Ray {{ $.Values.ray.version }} has no priorities, 2.56.0 is the first that has;
  take a newer image, or leave it out
{{- end -}}
{{- end -}}
{{- end }}
