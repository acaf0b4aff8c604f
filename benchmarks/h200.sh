#!/usr/bin/env bash
# Measures on one GPU, in parts that fit a limit of time each: benchmarks/h200.sh PART OUT [BUDGET]
# PART is collapse, product, loss (into OUT/h200.json), sweep-collapse, sweep-product or sweep-loss (into OUT/h200-sweep.json).
set -uo pipefail
part=$1 out=$2 budget=${3:-270}
export PYTHONPATH=. PYTHONUNBUFFERED=1

products=linear_scale_batchnorm1d_train,linear_scale_batchnorm1d_eval,linear_activation_scale
run() { python3 -m fxfuse bench --append --json "$out/h200.json" --budget "$budget" "$@"; }
sweep() { python3 -m fxfuse bench --sweep --append --json "$out/h200-sweep.json" --repeat 7 --precision fp32,bf16 --budget "$budget" "$@"; }
case $part in
collapse) run --workload matmul_div_sum_scale --vs eager,compile,max-autotune,two-step,frozen ;;
product) run --workload $products --vs eager,compile,max-autotune,product ;;
loss) run --workload kl_div,distillation_kl --vs eager,compile,max-autotune,liger ;;
sweep-collapse) sweep --workload matmul_div_sum_scale --vs eager,two-step ;;
sweep-product) sweep --workload $products --vs eager ;;
sweep-loss) sweep --workload kl_div,distillation_kl --vs eager,compile ;;
*) sed -n 2,3p "$0" >&2; exit 2 ;;
esac
