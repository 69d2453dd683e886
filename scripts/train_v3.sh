#!/usr/bin/env bash
# `lever train` under Lever-Plus's words; its environment variables (GRPO_EPOCHS, KL_BETA, …) are read by lever.
set -euo pipefail
usage() {
    echo "usage: bash scripts/train_v3.sh [TASK DATASET GPU FEATURES SAMPLER LVLM] [options of lever train]
  TASK vqa, GPU an index: vqa okvqa_local 0 query_img_text_icd_img_text rand_sampler qwen2.5_vl_3B" >&2
    exit 2
}

words=()
while [ $# -gt 0 ] && [ ${#words[@]} -lt 6 ] && [[ $1 != -[a-zA-Z-]* ]]; do
    words+=("$1")
    shift
done
gpu=${words[2]:-0}
[ "${words[0]:-vqa}" = vqa ] && [[ $gpu =~ ^[0-9]{1,4}$ ]] || usage

# A list that is set already (by a scheduler, say) is all there is: the index counts within it.
if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    export CUDA_VISIBLE_DEVICES=$((10#$gpu))
else
    IFS=', ' read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
    export CUDA_VISIBLE_DEVICES=${visible[10#$gpu]:-$CUDA_VISIBLE_DEVICES}
fi
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lever.sh" train \
    --dataset "${words[1]:-okvqa_local}" --features "${words[3]:-query_img_text_icd_img_text}" \
    --sampler "${words[4]:-rand_sampler}" --lvlm "${words[5]:-qwen2.5_vl_3B}" "$@"
