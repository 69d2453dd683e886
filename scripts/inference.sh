#!/usr/bin/env bash
# `lever infer` under Lever-Plus's words: the checkpoint of LEVER_LM_CHECKPOINT_PATH, else the latest of the run.
set -euo pipefail
usage() {
    echo "usage: bash scripts/inference.sh [TASK DATASET SHOTS FEATURES SAMPLER LVLM VERSION [TEST_DATA_NUM]] [options]
  TASK vqa, SHOTS 1 or more, VERSION v3 or v2, TEST_DATA_NUM a number (-1: all), options those of lever infer:
  vqa okvqa_local 5 query_img_text_icd_img_text rand_sampler qwen2.5_vl_3B v3" >&2
    exit 2
}

words=()
while [ $# -gt 0 ] && [[ $1 != -[a-zA-Z-]* ]]; do
    words+=("$1")
    shift
done
[ ${#words[@]} -le 8 ] && [ "${words[0]:-vqa}" = vqa ] && [[ ${words[2]:-5} =~ ^[1-9][0-9]*$ ]] || usage
[[ ${words[6]:-v3} =~ ^v[23]$ ]] && [[ ${words[7]:--1} =~ ^(-1|[0-9]+)$ ]] || usage

choice=()
named=${LEVER_LM_CHECKPOINT_PATH-}
# An empty variable is none, as for lever; --icds are choices in place of a checkpoint's.
[ -n "${named//[[:space:]]/}" ] || [[ " $* " =~ \ --icds[\ =] ]] || choice+=(--ckpt latest)
[ "${words[7]:--1}" = -1 ] || choice+=(--limit "${words[7]}")
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lever.sh" infer --shots "${words[2]:-5}" \
    --dataset "${words[1]:-okvqa_local}" --features "${words[3]:-query_img_text_icd_img_text}" \
    --sampler "${words[4]:-rand_sampler}" --lvlm "${words[5]:-qwen2.5_vl_3B}" ${choice[@]+"${choice[@]}"} "$@"
