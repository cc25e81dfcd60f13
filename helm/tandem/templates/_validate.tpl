{{/*
What the schema can't say of the values: refused when they are rendered, not when a cluster has half of them. Every
template below prints lines `<path>: <what is wrong>; <the way out>`, or nothing; an indented line goes on with the one
before it.

KubeRay checks a RayService only after the API server has taken it (`ValidationFailed` in its status), so its rules are
here too.
*/}}
{{- define "tandem.validate" -}}
{{- $faults := list -}}
{{- range list "names" "required" "config" "secrets" "redis" "groups" "placements" "classes" "encoders" "fit" "upgrade"
  "doors" "environment" "ray" -}}
{{- range $line := include (printf "tandem.validate.%s" .) $ | splitList "\n" -}}
{{- if hasPrefix "  " $line -}}
{{- $faults = append (initial $faults) (printf "%s %s" (last $faults) (trim $line)) -}}
{{- else if trim $line -}}
{{- $faults = append $faults (printf "values: %s" (trim $line)) -}}
{{- end -}}
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
{{- if not .Values.image.registry }}
image.registry: it is empty; say which registry holds the image, such as ghcr.io/acme
{{- end -}}
{{- if not (include "tandem.s3.bucket" .) }}
s3.bucket: it is empty; name the bucket for the pictures, or try the server out with s3.trial.enabled
{{- end -}}
{{- end }}

{{- define "tandem.validate.config" -}}
{{- range $path, $wayOut := .Files.Get "files/not-in-config.yaml" | fromYaml -}}
{{- $node := $.Values.config -}}
{{- range $room := splitList "." $path -}}
{{- $node = kindIs "map" $node | ternary (get ($node | default dict) $room) "" -}}
{{- end -}}
{{- if not (or (kindIs "invalid" $node) (eq (toString $node) "")) }}
config.{{ $path }}: it is not set here; {{ $wayOut }}
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
{{- if and (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$" $source)
  (not (hasSuffix ".safetensors" $source)) -}}
{{- if not (regexMatch "^[0-9a-f]{40}$" ($model.revision | default "")) }}
config.{{ $path }}.revision: {{ $source }} is a hub id; give the full commit hash (40 hex digits), so that every
  replica loads the same weights
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tandem.validate.secrets" -}}
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
{{- $gcs := .Values.redis.gcs -}}
{{- if and .Values.ray.gcsFaultTolerance (not $gcs.enabled) (not $gcs.address) }}
redis.gcs.enabled: it is off, and ray.gcsFaultTolerance needs a Redis; give redis.gcs.address, switch it on, or switch
  ray.gcsFaultTolerance off
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
{{- if and $group.memoryLimit (lt (include "tandem.quantity" $group.memoryLimit | float64)
  (include "tandem.quantity" $group.memory | float64)) }}
{{ $path }}.memoryLimit: {{ $group.memoryLimit }} is less than memory, {{ $group.memory }}; raise it, or leave it out
{{- end -}}
{{- $shm := include "tandem.quantity" $group.shm | float64 -}}
{{- if or (lt $shm 104857600.0) (ge $shm (include "tandem.quantity" $group.memory | float64)) }}
{{ $path }}.shm: {{ $group.shm }} of shared memory, which counts as memory ({{ $group.memory }}); take at least 100Mi,
  and less than memory
{{- end -}}
{{- end -}}
{{- $head := .Values.ray.head -}}
{{- if and $head.memoryLimit (lt (include "tandem.quantity" $head.memoryLimit | float64)
  (include "tandem.quantity" $head.memory | float64)) }}
ray.head.memoryLimit: {{ $head.memoryLimit }} is less than memory, {{ $head.memory }}; raise it, or leave it out
{{- end -}}
{{- $shm := include "tandem.quantity" $head.shm | float64 -}}
{{- if or (lt $shm 104857600.0) (ge $shm (include "tandem.quantity" $head.memory | float64)) }}
ray.head.shm: {{ $head.shm }} of shared memory, which counts as memory ({{ $head.memory }}); take at least 100Mi, and
  less than memory
{{- end -}}
{{- end }}

{{/*
Every placement as {path, num_gpus, num_cpus, replicas, gpu_class, device}, `diffusion` under it, as YAML: what the
server makes of them (serve/settings.py, serve/placements.py).
*/}}
{{- define "tandem.placements" -}}
{{- $defaults := dict "num_gpus" 0 "num_cpus" 0.5 "replicas" 1 "gpu_class" "" "device" "auto" -}}
{{- $diffusion := .Values.config.diffusion | default dict -}}
{{- $all := list -}}
{{- $placements := .Values.config.placements | default dict -}}
{{- range $name, $placement := $placements | empty | ternary (dict "" dict) $placements -}}
{{- $one := dict "path" (ternary (printf "config.placements.%s" $name) "config.diffusion" (ne $name "")) -}}
{{- range $key, $value := $defaults -}}
{{- range $from := list $diffusion ($placement | default dict) -}}
{{- if and (hasKey $from $key) (not (kindIs "invalid" (get $from $key))) -}}
{{- $value = get $from $key -}}
{{- end -}}
{{- end -}}
{{- $_ := set $one $key $value -}}
{{- end -}}
{{- $all = append $all $one -}}
{{- end -}}
{{- dict "all" $all | toYaml -}}
{{- end }}

{{- define "tandem.validate.placements" -}}
{{- range $one := (include "tandem.placements" . | fromYaml).all -}}
{{- if and $one.replicas (gt ($one.num_gpus | float64) 1.0) }}
{{ $one.path }}.num_gpus: {{ $one.num_gpus }} of one card; a denoiser runs on one, so say 1, or a share of one
{{- end -}}
{{- end -}}
{{- end }}

{{/* The classes that placements and encoders name. */}}
{{- define "tandem.validate.classes" -}}
{{- $classes := .Values.config.gpu_classes | default dict -}}
{{- $labels := dict -}}
{{- range $group := .Values.workerGroups -}}
{{- with $group.gpuClass -}}
{{- $_ := set $labels (include "tandem.classLabel" (dict "context" $ "gpuClass" .)) true -}}
{{- end -}}
{{- end -}}
{{- range $one := concat (include "tandem.placements" . | fromYaml).all (include "tandem.encoders" . | fromYaml).all -}}
{{- if (hasKey $one "replicas" | ternary $one.replicas true) -}}
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
min_replicas, max_replicas}. */}}
{{- define "tandem.encoders" -}}
{{- $defaults := dict "gpu_class" "" "device" "auto" "num_gpus" 0 "num_cpus" 0.2 "min_replicas" 1 "max_replicas" 1 -}}
{{- $base := .Values.config.encoder | default dict -}}
{{- $all := list -}}
{{- $named := .Values.config.encoders | default dict -}}
{{- range $name, $encoder := merge (dict "" dict) $named -}}
{{- $one := dict "name" $name "path" (ternary (printf "config.encoders.%s" $name) "config.encoder" (ne $name "")) -}}
{{- range $key, $value := $defaults -}}
{{- range $from := list $base ($encoder | default dict) -}}
{{- if and (hasKey $from $key) (not (kindIs "invalid" (get $from $key))) -}}
{{- $value = get $from $key -}}
{{- end -}}
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
Whether the fixed replicas fit on the worker groups at their `max`, shares of cards and CPUs both. Ray counts a pod's
CPUs up to whole ones, and a share in ten-thousandths. Largest first, each into the first pod that holds it, what is
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
  (int $group.max)) -}}
{{- end -}}
{{- $wishes := list -}}
{{- range $one := (include "tandem.placements" . | fromYaml).all -}}
{{- $label := "" -}}
{{- with $one.gpu_class -}}
{{- $label = include "tandem.classLabel" (dict "context" $ "gpuClass" .) -}}
{{- end -}}
{{- $wishes = append $wishes (dict "path" $one.path "count" "replicas" "replicas" (int $one.replicas) "label" $label
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
{{ $wish.path }}.{{ $wish.count }}: {{ $wish.replicas }} replicas of {{ $wish.num_gpus }} GPU and {{ $wish.num_cpus }}
  CPUs each, and {{ $placed }} of them fit on the worker groups{{ if not $classless }} of class
  {{ $wish.label }}{{ end }} at their `max`, beside the others; raise a group's max, or lower replicas or shares
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
  (drain_s of config.diffusion and config.placements); make it longer than that
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
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}
gateway.parentRefs: it is empty, so that no Gateway takes the route; name one
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
ingress.hosts: it is empty; name the hosts under which the server is reached
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
  "RAY_ADDRESS" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_enable_autoscaler_v2" "RAY_external_storage_namespace" -}}
{{- if include "tandem.s3.secretName" . -}}
{{- $taken = concat $taken (list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY") -}}
{{- end -}}
{{- range $path, $list := $lists -}}
{{- range $index, $one := $list -}}
{{- if hasPrefix "TANDEM_" $one.name }}
{{ $path }}[{{ $index }}].name: {{ $one.name }} is a setting; say it in config, or, if it is secret, in the existing
  Secret for it
{{- else if has $one.name $taken }}
{{ $path }}[{{ $index }}].name: {{ $one.name }} is set by the chart or by KubeRay; leave it out
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
