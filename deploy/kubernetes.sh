#!/usr/bin/env bash
# Runs a Spark program on Kubernetes. The plugin starts a sidecar in each executor's container; with TEMPLATE, the
# sidecar has its own container in the executor's pod.
#
#     IMAGE=registry.example.com/flightsvc:0.1.0 deploy/kubernetes.sh k8s://https://HOST:6443 PROGRAM [ARGUMENT...]
#     TEMPLATE=deploy/kubernetes.yaml IMAGE=... deploy/kubernetes.sh ...
#
# PROGRAM is a path in the image (local:///...), or a URI that the driver's pod can read.
set -euo pipefail
: "${IMAGE:?set IMAGE to the image that deploy/Dockerfile makes}"
if [[ -n ${TEMPLATE:-} ]]; then
	sidecar=(--conf "spark.kubernetes.executor.podTemplateFile=$TEMPLATE"
		--conf spark.kubernetes.executor.podTemplateContainerName=spark-kubernetes-executor)
else
	sidecar=(--conf spark.plugins=io.flightsvc.spark.FlightsvcPlugin)
fi
# The sidecar uses memory outside the JVM: 512 MB for TensorFlow, and the memory of the models.
exec spark-submit --master "$1" --deploy-mode cluster \
	--conf spark.kubernetes.container.image="$IMAGE" \
	--conf spark.kubernetes.namespace="${NAMESPACE:-default}" \
	--conf spark.kubernetes.authenticate.driver.serviceAccountName="${ACCOUNT:-spark}" \
	--conf spark.executor.memoryOverhead="${OVERHEAD:-2g}" \
	"${sidecar[@]}" "${@:2}"
