{{/* What the pods of Ray have in common. */}}

{{/*
Labels in a pod template of Ray: these two alone, see `tandem.selectorLabels`. Not `app.kubernetes.io/name` either:
KubeRay selects the head by its own value of that. Takes {context, component}.
*/}}
{{- define "tandem.ray.labels" -}}
app.kubernetes.io/instance: {{ .context.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* A Kubernetes quantity as a plain number: `1Gi` is 1073741824, `500m` is 0.5. */}}
{{- define "tandem.quantity" -}}
{{- $scale := dict "" 1 "m" 0.001 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "P" 1e15 "E" 1e18 "Ki" 1024
  "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- $given := toString . -}}
{{- $digits := regexFind "^[0-9.]+([eE][+-]?[0-9]+)?" $given -}}
{{- printf "%.3f" (mulf (float64 $digits) (get $scale (trimPrefix $digits $given) | float64)) -}}
{{- end }}

{{/* Seconds for which the replicas on a pod that is to go may look for another place, beyond their drain. */}}
{{- define "tandem.ray.leaveSeconds" -}}
{{- add (include "tandem.drainSeconds" .) 60 -}}
{{- end }}

{{/* Seconds that Kubernetes gives a pod of Ray: that, and time for what is not Tandem's. */}}
{{- define "tandem.ray.graceSeconds" -}}
{{- add (include "tandem.ray.leaveSeconds" .) 60 -}}
{{- end }}

{{/*
Memory for Ray's object store: what its shared memory has, less a tenth. Without it Ray reserves a share of the pod's
memory, and falls back to a disk where /dev/shm is smaller. Takes the quantity.
*/}}
{{- define "tandem.ray.objectStoreBytes" -}}
{{- printf "%.0f" (mulf (include "tandem.quantity" . | float64) 0.9 | floor) -}}
{{- end }}

{{/*
Environment of a container that runs Ray: Tandem's, ours for Ray, and a group's, in place of what `extraEnv` says of the
same variable. Takes {context, extra}.
*/}}
{{- define "tandem.ray.env" -}}
{{- $names := list -}}
{{- range .extra -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range include "tandem.env" .context | fromYamlArray }}
{{- if not (has .name $names) }}
{{ list . | toYaml }}
{{- end }}
{{- end }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- with .extra }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* No CPU limit: a replica that computes on CPUs may use what is idle. Takes {cpu, memory, memoryLimit, gpus}. */}}
{{- define "tandem.ray.resources" -}}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory | quote }}
limits:
  memory: {{ .memoryLimit | default .memory | quote }}
{{- if int .gpus }}
  nvidia.com/gpu: {{ int .gpus }}
{{- end }}
{{- end }}

{{/*
A worker that is to go says so to Ray: Serve then starts its replicas elsewhere, and stops these within their drain. Its
raylet ends when nothing is left, and the pod with it. Where the head does not answer there is nobody to wait for.
*/}}
{{- define "tandem.ray.workerLifecycle" -}}
preStop:
  exec:
    command:
      - bash
      - -c
      - >-
        timeout 30 ray drain-node --address "$RAY_ADDRESS" --reason DRAIN_NODE_REASON_PREEMPTION
        --reason-message "Kubernetes ends the pod"
        --deadline-remaining-seconds {{ include "tandem.ray.leaveSeconds" . }}
        && sleep {{ include "tandem.ray.leaveSeconds" . }}
{{- end }}

{{/*
A head that goes together with its workers, as the whole cluster does after an upgrade, waits for them: without it
nobody stops their replicas in order. One that goes alone finds no worker on its way out, and waits for 15 s.
*/}}
{{- define "tandem.ray.headLifecycle" -}}
preStop:
  exec:
    command:
      - timeout
      - {{ include "tandem.ray.leaveSeconds" . | quote }}
      - python
      - -c
      - |
        import time

        import ray
        from ray._private.state import state

        ray.init(address="auto", log_to_driver=False)
        time.sleep(15)
        while state.get_draining_nodes():
            time.sleep(1)
{{- end }}

{{/* Ray's label of a group's nodes: what the class says, else its name. Takes {context, gpuClass}. */}}
{{- define "tandem.classLabel" -}}
{{- $class := get (.context.Values.config.gpu_classes | default dict) .gpuClass | default dict -}}
{{- $class.label | default .gpuClass -}}
{{- end }}

{{- define "tandem.ray.head" -}}
{{- $head := .Values.ray.head -}}
{{- /* No replica runs on the head: 0 CPUs of Ray, whatever Kubernetes gives it. */ -}}
rayStartParams:
  num-cpus: "0"
  object-store-memory: {{ include "tandem.ray.objectStoreBytes" $head.shm | quote }}
template:
  metadata:
    labels:
      {{- include "tandem.ray.labels" (dict "context" . "component" "head") | nindent 6 }}
      {{- with $head.labels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $head.annotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- with include "tandem.pullSecrets" . }}
    {{- . | nindent 4 }}
    {{- end }}
    # KubeRay gives it a service account with the autoscaler's rights.
    automountServiceAccountToken: true
    enableServiceLinks: false
    restartPolicy: Never
    terminationGracePeriodSeconds: {{ include "tandem.ray.graceSeconds" . }}
    securityContext:
      {{- include "tandem.podSecurityContext" . | nindent 6 }}
    {{- with $head.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $head.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $head.affinity }}
    affinity:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $head.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    containers:
      - name: ray-head
        image: {{ include "tandem.image" (dict "context" . "variant" "cpu") }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: client, containerPort: 10001}
          - {name: serve, containerPort: 8000}
          - {name: metrics, containerPort: 8080}
        env:
          {{- include "tandem.ray.env" (dict "context" . "extra" list) | trim | nindent 10 }}
        resources:
          {{- include "tandem.ray.resources" (dict "cpu" $head.cpu "memory" $head.memory "memoryLimit"
            $head.memoryLimit "gpus" 0) | nindent 10 }}
        securityContext:
          {{- include "tandem.containerSecurityContext" . | nindent 10 }}
        lifecycle:
          {{- include "tandem.ray.headLifecycle" . | nindent 10 }}
        volumeMounts:
          {{- include "tandem.volumeMounts" . | nindent 10 }}
          - {name: shm, mountPath: /dev/shm}
          - {name: ray-logs, mountPath: /tmp/ray}
    volumes:
      {{- include "tandem.volumes" . | nindent 6 }}
      - name: shm
        emptyDir:
          medium: Memory
          sizeLimit: {{ $head.shm }}
      # By KubeRay's name: it mounts this into the autoscaler's container too.
      - name: ray-logs
        emptyDir:
          sizeLimit: {{ .Values.scratch.sizeLimit }}
{{- end }}

{{/* Takes {context, group}; the group as in the values. */}}
{{- define "tandem.ray.group" -}}
{{- $context := .context -}}
{{- $group := include "tandem.group" . | fromYaml -}}
{{- $gpus := int $group.gpus -}}
groupName: {{ $group.name | quote }}
# Where the cluster starts; then the autoscaler says.
replicas: {{ int $group.min }}
minReplicas: {{ int $group.min }}
maxReplicas: {{ int $group.max }}
{{- if not (kindIs "invalid" $group.idle) }}
idleTimeoutSeconds: {{ int $group.idle }}
{{- end }}
{{- if int $group.priority }}
priority: {{ int $group.priority }}
{{- end }}
{{- with $group.gpuClass }}
labels:
  tandem.dev/gpu-class: {{ include "tandem.classLabel" (dict "context" $context "gpuClass" .) | quote }}
{{- end }}
rayStartParams:
  object-store-memory: {{ include "tandem.ray.objectStoreBytes" $group.shm | quote }}
template:
  metadata:
    labels:
      {{- include "tandem.ray.labels" (dict "context" $context "component" "worker") | nindent 6 }}
      {{- with $group.labels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $group.annotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- with include "tandem.pullSecrets" $context }}
    {{- . | nindent 4 }}
    {{- end }}
    serviceAccountName: {{ include "tandem.serviceAccountName" $context }}
    automountServiceAccountToken: {{ $context.Values.serviceAccount.automount }}
    enableServiceLinks: false
    restartPolicy: Never
    terminationGracePeriodSeconds: {{ include "tandem.ray.graceSeconds" $context }}
    securityContext:
      {{- include "tandem.podSecurityContext" $context | nindent 6 }}
    {{- with include "tandem.group.scheduling" (dict "group" $group) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    topologySpreadConstraints:
      {{- include "tandem.ray.spread" (dict "context" $context "group" $group) | nindent 6 }}
    containers:
      - name: ray-worker
        image: {{ include "tandem.image" (dict "context" $context "variant" (ternary "cuda" "cpu" (gt $gpus 0))) }}
        imagePullPolicy: {{ $context.Values.image.pullPolicy }}
        ports:
          - {name: serve, containerPort: 8000}
          - {name: metrics, containerPort: 8080}
        env:
          {{- include "tandem.ray.env" (dict "context" $context "extra" $group.extraEnv) | trim | nindent 10 }}
        resources:
          {{- include "tandem.ray.resources" $group | nindent 10 }}
        securityContext:
          {{- include "tandem.containerSecurityContext" $context | nindent 10 }}
        lifecycle:
          {{- include "tandem.ray.workerLifecycle" $context | nindent 10 }}
        volumeMounts:
          {{- include "tandem.volumeMounts" $context | nindent 10 }}
          - {name: shm, mountPath: /dev/shm}
          {{- with $group.extraVolumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
    volumes:
      {{- include "tandem.volumes" $context | nindent 6 }}
      - name: shm
        emptyDir:
          medium: Memory
          sizeLimit: {{ $group.shm }}
      {{- with $group.extraVolumes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
{{- end }}

{{/* Over nodes and zones, where there are several; or as given. Takes {context, group}, merged. */}}
{{- define "tandem.ray.spread" -}}
{{- $selector := dict "matchLabels" (dict "app.kubernetes.io/instance" .context.Release.Name
  "app.kubernetes.io/component" "worker" "ray.io/group" .group.name) -}}
{{- if .group.topologySpreadConstraints -}}
{{- $constraints := list -}}
{{- range .group.topologySpreadConstraints -}}
{{- $constraints = append $constraints (hasKey . "labelSelector" | ternary .
  (set (deepCopy .) "labelSelector" $selector)) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- else -}}
{{- $constraints := list -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" -}}
{{- $constraints = append $constraints (dict "maxSkew" 1 "topologyKey" . "whenUnsatisfiable" "ScheduleAnyway"
  "labelSelector" $selector) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- end -}}
{{- end }}

{{/* The Serve configuration, as YAML. */}}
{{- define "tandem.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  keep_alive_timeout_s: {{ int .Values.serve.keepAliveTimeoutSeconds }}
  request_timeout_s: {{ int .Values.serve.requestTimeoutSeconds }}
applications:
  - name: tandem
    route_prefix: /
    import_path: deployments.app:build
    args:
      {{- include "tandem.settings" . | nindent 6 }}
{{- end }}
