#!/usr/bin/env bash
# Runs a Spark program on YARN. Hosts need Python 3.11 but not flightsvc: the Python environment is shipped as an
# archive, which YARN unpacks once per host as ./environment. The plugin finds the sidecar in it.
#
#     make wheel && deploy/yarn.sh PROGRAM [ARGUMENT...]
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
place=$root/build/yarn
wheel=$(ls "$root"/dist/flightsvc-*.whl)
archive=$place/environment-$(sha256sum "$wheel" | cut -c 1-12).tar.gz

if [[ ! -e $archive ]]; then
	rm -rf "$place"
	mkdir -p "$place"
	python3.11 -m venv --copies "$place/environment"
	"$place/environment/bin/pip" install --quiet "${wheel}[tf]" "pandas>=2.2,<3" venv-pack
	"$place/environment/bin/venv-pack" --prefix "$place/environment" --output "$archive.part" --format tar.gz
	mv "$archive.part" "$archive"
fi
jar=$place/environment/lib/python3.11/site-packages/flightsvc/_jars/flightsvc-spark-plugin.jar
exec spark-submit --master yarn --deploy-mode cluster \
	--archives "$archive#environment" --jars "$jar" \
	--conf spark.yarn.appMasterEnv.PYSPARK_PYTHON=./environment/bin/python \
	--conf spark.executorEnv.PYSPARK_PYTHON=./environment/bin/python \
	--conf spark.plugins=io.flightsvc.spark.FlightsvcPlugin \
	--conf spark.driver.extraClassPath=flightsvc-spark-plugin.jar \
	--conf spark.executor.memoryOverhead="${OVERHEAD:-2g}" \
	"$@"
