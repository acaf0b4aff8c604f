#!/usr/bin/env bash
# Measures on one GPU, in parts that fit a limit of time each: benchmarks/h200.sh PART OUT [BUDGET]
# PART is loss, collapse or product; the results of all parts go into OUT/h200.json, one --append after another.
set -uo pipefail
part=$1 out=$2 budget=${3:-270}
export PYTHONPATH=. PYTHONUNBUFFERED=1

run() { python3 -m fxfuse bench --append --json "$out/h200.json" --vs eager,compile,fxfuse "$@"; }
case $part in
loss) run --workload kl_div,distillation_kl --budget "$budget" ;;
collapse) run --workload matmul_div_sum_scale --budget "$budget" ;;
product) run --workload linear_scale_batchnorm1d_train,linear_scale_batchnorm1d_eval,linear_activation_scale --budget "$budget" ;;
*) echo "parts: loss, collapse, product" >&2; exit 2 ;;
esac
