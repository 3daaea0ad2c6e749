#!/usr/bin/env bash
# One stage of the full pipeline: scripts/pipeline.sh tokenizer|pretrain|sft|rl. `make speedrun` runs them in order.
# Finished stages are skipped, interrupted ones resume: run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."

LMCHAT=${LMCHAT:-lmchat}
BASE=${BASE:-${LMCHAT_BASE_DIR:-$HOME/.cache/lmchat}}  # output folder
TEXT=${TEXT:-}                                         # a folder of text to train on, instead of a download
DEPTH=${DEPTH:-26}
SHARDS=${SHARDS:-160}                                  # to download: 160 × 250 M characters are one epoch of d26
DEVICES=${DEVICES:-auto}
BUNDLE=$BASE/eval_bundle                               # evaluates CORE after pretraining, if it is there
[ -d "$BUNDLE" ] || BUNDLE=
TOKENIZER_SHARDS=8                                     # the 2 G characters for the tokenizer and the word list
export LMCHAT_BASE_DIR=$BASE

# Downloads the remaining shards while the tokenizer is trained on the first ones.
tokenizer() {
  local first=$((SHARDS > 0 && SHARDS < TOKENIZER_SHARDS ? SHARDS : TOKENIZER_SHARDS))
  if [ -n "$TEXT" ]; then
    [ -d "$BASE/base_data" ] || $LMCHAT data import "$TEXT"
  elif [ ! -f "$BASE/base_data/.complete_$SHARDS" ]; then
    $LMCHAT data download --num_shards "$first"
    (exec $LMCHAT data download --num_shards "$SHARDS" > "$BASE/download.log" 2>&1) &
    download=$!
    trap 'kill "$download" 2> /dev/null || true' EXIT  # Ctrl-C does not reach background jobs
  fi
  [ -f "$BASE/words.txt" ] || $LMCHAT data words --max_shards "$first"
  if [ -f "$BASE/tokenizer/tokenizer.json" ]; then
    echo "tokenizer: finished, in $BASE/tokenizer"
  else
    $LMCHAT tokenizer train --max_shards "$first" ${VOCAB_SIZE:+--vocab_size "$VOCAB_SIZE"}
  fi
  [ -z "${download:-}" ] || finish_download
}

# A failed download ends the stage, so that nothing is trained on an incomplete set of shards.
finish_download() {
  local status=0
  echo "waiting for the download, see $BASE/download.log"
  wait "$download" || status=$?
  trap - EXIT
  if [ "$status" -ne 0 ]; then
    tail -n 1 "$BASE/download.log" >&2
    echo "the download of $SHARDS shards failed (status $status); complete shards are kept; run again to resume" >&2
    exit "$status"
  fi
  touch "$BASE/base_data/.complete_$SHARDS"
}

# Trains a stage from its last checkpoint or the previous stage's, and evaluates it once. Arguments: name, folder, options.
stage() {
  local checkpoints="$BASE/$2/d$DEPTH" report="$BASE/evaluations/d${DEPTH}_$1.txt"
  local run=(--trainer.devices "$DEVICES" --model.tag "d$DEPTH" "${@:3}")
  $LMCHAT fit "${run[@]}" --ckpt_path auto
  [ "$report" -nt "$(ls -t "$checkpoints"/meta_*.json | head -n 1)" ] && return
  mkdir -p "$BASE/evaluations"
  $LMCHAT validate "${run[@]}" --ckpt_path "$checkpoints" | tee "$report.tmp"
  mv "$report.tmp" "$report"
}

case ${1:-} in
  tokenizer) tokenizer ;;
  pretrain)
    stage pretrain base_checkpoints --config "${PRETRAIN:-configs/d26_pretrain.yaml}" --model.depth "$DEPTH" \
      ${BUNDLE:+--core.bundle "$BUNDLE"}
    ;;
  sft) stage sft chatsft_checkpoints --config "${SFT:-configs/sft.yaml}" ;;
  rl) stage rl chatrl_checkpoints --config "${RL:-configs/grpo.yaml}" ;;
  *) echo "usage: scripts/pipeline.sh tokenizer|pretrain|sft|rl" >&2; exit 2 ;;
esac
