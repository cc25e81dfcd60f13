{{/* Named templates of what stands around the Ray cluster: Redis, the trial S3, Jobs, policies, tests. */}}

{{/*
What every object has: a name (`<fullname>-<suffix>`, or without a suffix the full name), labels, annotations. Takes
{context, component, suffix, own}; `own` are annotations of its own.
*/}}
{{- define "tandem.metadata" -}}
name: {{ list (include "tandem.fullname" .context) .suffix | compact | join "-" }}
namespace: {{ .context.Release.Namespace }}
labels:
  {{- include "tandem.labels" . | nindent 2 }}
{{- with include "tandem.annotations" . }}
{{ . }}
{{- end }}
{{- end }}

{{/*
Labels of pods that are not Ray's. Without the chart's version: an upgrade that changes nothing of a Redis shall not
restart it. Takes {context, component}.
*/}}
{{- define "tandem.podLabels" -}}
{{- $labels := include "tandem.selectorLabels" . | fromYaml -}}
{{- range $key, $value := .context.Values.commonLabels -}}
{{- if not (hasKey $labels $key) -}}
{{- $_ := set $labels $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end }}

{{/*
What selects Ray's pods, whichever of the release's clusters they belong to: KubeRay puts the second label on the head,
the workers, and the pod of the Job by which it clears Redis after a cluster. Takes the root.
*/}}
{{- define "tandem.rayLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
ray.io/is-ray-node: "yes"
{{- end }}

{{/* `podSecurityContext` for an image whose user is another one. Takes {context, id}. */}}
{{- define "tandem.podSecurityContextAs" -}}
{{- $context := deepCopy .context.Values.podSecurityContext -}}
{{- range list "runAsUser" "runAsGroup" "fsGroup" -}}
{{- if hasKey $context . -}}
{{- $_ := set $context . $.id -}}
{{- end -}}
{{- end -}}
{{- toYaml $context -}}
{{- end }}

{{/*
Configuration of a Redis, without its password. Takes {context, which}.

An append-only file is rewritten by a forked process, and what is written meanwhile is in memory twice: so the servers
that have one keep half of their pod's memory, and an order finds them full before the kernel does.
*/}}
{{- define "tandem.redis.config" -}}
{{- $cache := eq .which "cache" -}}
{{- $memory := include "tandem.quantity" (index .context.Values.redis .which).memory | float64 -}}
bind * -::*
port 6379
dir /data
save ""
tcp-keepalive 60
maxmemory {{ mulf $memory (ternary 0.75 0.5 $cache) | floor | printf "%.0f" }}
maxmemory-policy {{ ternary "allkeys-lfu" "noeviction" $cache }}
appendonly {{ ternary "no" "yes" $cache }}
appendfsync {{ eq .which "jobs" | ternary "always" "everysec" }}
{{- end }}

{{/*
Pod template of a Redis of ours, with a volume `data`. Takes {context, which}.

The server reads its configuration from standard input: so the password is in no file and on no command line. It takes
the shell's place, gets the pod's SIGTERM itself and then writes what it holds. Images of Redis are as good as those of
Valkey: whichever server is there is started.
*/}}
{{- define "tandem.redis.pod" -}}
{{- $redis := index .context.Values.redis .which -}}
{{- $labels := dict "context" .context "component" (printf "redis-%s" .which) -}}
metadata:
  labels:
    {{- include "tandem.podLabels" $labels | nindent 4 }}
  {{- with include "tandem.annotations" (dict "context" .context "own" dict) }}
  {{- . | nindent 2 }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 60
  {{- with include "tandem.pullSecrets" .context }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "tandem.podSecurityContextAs" (dict "context" .context "id" 999) | nindent 4 }}
  {{- with $redis.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $redis.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $redis.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: redis
      image: {{ .context.Values.redis.image }}
      imagePullPolicy: {{ .context.Values.redis.pullPolicy }}
      command: [sh, -ec]
      args:
        - |
          # The URL in Tandem's environment has the password as it stands.
          case "$REDISCLI_AUTH" in
            "" | *[!A-Za-z0-9._~-]*)
              echo "the Secret's password must have letters, digits, '.', '_', '~' and '-' alone" >&2
              exit 1
              ;;
          esac
          exec "$(command -v valkey-server || command -v redis-server)" - <<END
          {{- include "tandem.redis.config" . | nindent 10 }}
          requirepass $REDISCLI_AUTH
          END
      env:
        # For the command line client, in probes too. One name each: Redis' and Valkey's.
        {{- range list "REDISCLI_AUTH" "VALKEYCLI_AUTH" }}
        - name: {{ . }}
          valueFrom:
            secretKeyRef:
              name: {{ include "tandem.redis.secretName" $.context }}
              key: password
        {{- end }}
      ports:
        - name: redis
          containerPort: 6379
      readinessProbe:
        exec:
          command: [sh, -c, '[ "$("$(command -v valkey-cli || command -v redis-cli)" ping)" = PONG ]']
        periodSeconds: 5
        timeoutSeconds: 5
      # Any answer is a sign of life: one that loads its file, or can't write it, says so, and a restart is no help.
      livenessProbe:
        exec:
          command: [sh, -c, '[ -n "$("$(command -v valkey-cli || command -v redis-cli)" ping 2>/dev/null)" ]']
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      resources:
        requests:
          cpu: {{ $redis.cpu | quote }}
          memory: {{ $redis.memory | quote }}
        limits:
          memory: {{ $redis.memory | quote }}
      securityContext:
        {{- include "tandem.containerSecurityContext" .context | nindent 8 }}
      volumeMounts:
        - name: data
          mountPath: /data
{{- end }}

{{/* Takes {context, which}. */}}
{{- define "tandem.redis.service" -}}
{{- $name := printf "redis-%s" .which -}}
{{- $labels := dict "context" .context "component" $name "suffix" $name -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "tandem.metadata" $labels | nindent 2 }}
spec:
  type: ClusterIP
  selector:
    {{- include "tandem.selectorLabels" $labels | nindent 4 }}
  ports:
    - name: redis
      port: 6379
      targetPort: redis
{{- end }}

{{/*
A Redis with a disk. One replica: what was acknowledged is on its disk, and while it is away clients wait or hear 503.
Takes {context, which}.
*/}}
{{- define "tandem.redis.statefulSet" -}}
{{- $redis := index .context.Values.redis .which -}}
{{- $name := printf "redis-%s" .which -}}
{{- $labels := dict "context" .context "component" $name "suffix" $name -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  {{- include "tandem.metadata" $labels | nindent 2 }}
spec:
  replicas: 1
  serviceName: {{ include "tandem.redis.name" . }}
  selector:
    matchLabels:
      {{- include "tandem.selectorLabels" $labels | nindent 6 }}
  # Neither an uninstalled release nor a smaller set takes the data with it.
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: Retain
    whenScaled: Retain
  template:
    {{- include "tandem.redis.pod" . | nindent 4 }}
  volumeClaimTemplates:
    - apiVersion: v1
      kind: PersistentVolumeClaim
      metadata:
        name: data
        labels:
          {{- include "tandem.selectorLabels" $labels | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $redis.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ $redis.storage | quote }}
{{- end }}

{{/* `egress:` rules for pods that may reach what `networkPolicy.egress` names, and what Tandem is made of. */}}
{{- define "tandem.egress" -}}
- ports:
    # 5353 is where OpenShift's servers listen, behind the 53 of their service.
    {{- range list 53 5353 }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
- to:
    - podSelector:
        matchLabels:
          {{- include "tandem.rayLabels" . | nindent 10 }}
{{- range list "jobs" "cache" "gcs" }}
{{- if include "tandem.redis.own" (dict "context" $ "which" .) }}
- to:
    - podSelector:
        matchLabels:
          {{- include "tandem.selectorLabels" (dict "context" $ "component" (printf "redis-%s" .)) | nindent 10 }}
  ports:
    - {port: 6379, protocol: TCP}
{{- end }}
{{- end }}
{{- if .Values.s3.trial.enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "tandem.selectorLabels" (dict "context" . "component" "s3-trial") | nindent 10 }}
  ports:
    - {port: 5000, protocol: TCP}
{{- end }}
{{ toYaml .Values.networkPolicy.egress }}
{{- end }}

{{/*
"true" where there are pods for `helm test`. They go to `<fullname>-serve-svc`, which KubeRay does not make for an
upgrade in steps: there each cluster has a service of its own.
*/}}
{{- define "tandem.hasTests" -}}
{{- if and .Values.tests.enabled (ne .Values.ray.upgrade.type "NewClusterWithIncrementalUpgrade") -}}true{{- end -}}
{{- end }}

{{- define "tandem.hasPreload" -}}
{{- if and .Values.weights.enabled (.Values.weights.preload | default dict).enabled -}}true{{- end -}}
{{- end }}

{{/* The Job that fetches the models, all but its name. */}}
{{- define "tandem.preload.spec" -}}
{{- $preload := .Values.weights.preload -}}
{{- $labels := dict "context" . "component" "preload" -}}
backoffLimit: 4
activeDeadlineSeconds: {{ int $preload.deadlineSeconds }}
{{- if not (kindIs "invalid" $preload.ttlSeconds) }}
ttlSecondsAfterFinished: {{ int $preload.ttlSeconds }}
{{- end }}
# A drained node is no failure.
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  metadata:
    labels:
      {{- include "tandem.podLabels" $labels | nindent 6 }}
    {{- with include "tandem.annotations" (dict "context" . "own" dict) }}
    {{- . | nindent 4 }}
    {{- end }}
  spec:
    restartPolicy: Never
    serviceAccountName: {{ include "tandem.serviceAccountName" . }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    {{- with include "tandem.pullSecrets" . }}
    {{- . | nindent 4 }}
    {{- end }}
    securityContext:
      {{- include "tandem.podSecurityContext" . | nindent 6 }}
    {{- with $preload.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $preload.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: fetch
        image: {{ include "tandem.image" (dict "context" . "variant" "cpu") }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        command: [tandem, fetch]
        env:
          {{- include "tandem.baseEnv" . | nindent 10 }}
          {{- with .Values.webhooks.existingSecret }}
          # Settings that name hosts for webhooks are none without it.
          - name: TANDEM_WEBHOOKS__SECRET
            valueFrom:
              secretKeyRef:
                name: {{ . }}
                key: secret
          {{- end }}
        resources:
          requests:
            cpu: {{ $preload.cpu | quote }}
            memory: {{ $preload.memory | quote }}
          limits:
            memory: {{ $preload.memory | quote }}
        securityContext:
          {{- include "tandem.containerSecurityContext" . | nindent 10 }}
        volumeMounts:
          {{- include "tandem.volumeMounts" . | nindent 10 }}
    volumes:
      {{- include "tandem.volumes" . | nindent 6 }}
{{- end }}

{{/*
A pod of `helm test`, which runs one script. A test that fails stays, to be looked at. Takes {context, test, weight,
deadline, script}: the script is run by sh, with the server's address as $URL.
*/}}
{{- define "tandem.testPod" -}}
{{- $hooks := dict "helm.sh/hook" "test" -}}
{{- $_ := set $hooks "helm.sh/hook-weight" (toString .weight) -}}
{{- $_ := set $hooks "helm.sh/hook-delete-policy" "before-hook-creation,hook-succeeded" -}}
{{- $own := dict "context" .context "component" "test" "suffix" (printf "test-%s" .test) "own" $hooks -}}
apiVersion: v1
kind: Pod
metadata:
  {{- include "tandem.metadata" $own | nindent 2 }}
spec:
  restartPolicy: Never
  activeDeadlineSeconds: {{ .deadline }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with include "tandem.pullSecrets" .context }}
  {{- . | nindent 2 }}
  {{- end }}
  securityContext:
    {{- include "tandem.podSecurityContext" .context | nindent 4 }}
  {{- with .context.Values.tests.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .context.Values.tests.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: test
      image: {{ include "tandem.image" (dict "context" .context "variant" "cpu") }}
      imagePullPolicy: {{ .context.Values.image.pullPolicy }}
      command: [sh, -ec]
      args:
        - |
          {{- .script | trim | nindent 10 }}
      env:
        - name: HOME
          value: /home/tandem
        - name: URL
          value: http://{{ include "tandem.serveService" .context }}:{{ int .context.Values.service.port }}
        - name: TANDEM_KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "tandem.firstKey.secretName" .context }}
              key: key
      resources:
        requests:
          cpu: 100m
          memory: 256Mi
        limits:
          memory: 512Mi
      securityContext:
        {{- include "tandem.containerSecurityContext" .context | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: home
          mountPath: /home/tandem
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: 256Mi
    - name: home
      emptyDir:
        sizeLimit: 64Mi
{{- end }}
