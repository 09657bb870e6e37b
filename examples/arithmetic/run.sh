#!/usr/bin/env bash
# Reinforcement learning that can be seen to work, from nothing, on two CPU cores in about ten minutes: a small model is made
# and fine-tuned on demonstrations that mostly skip the work; then PPO with the exact rule, PPO with a trained verifier, GRPO and
# RLOO each start from it. Prints one table on 1000 held-out problems.
#
#   bash examples/arithmetic/run.sh              another seed, for problems and weights:  SEED=1 bash examples/arithmetic/run.sh
#
# Other settings: RUN (output folder), ITERATIONS (of 256 responses), PYTHON (an interpreter that has the package)
set -euo pipefail
cd "$(dirname "$0")/../.."

SEED=${SEED:-0}
RUN=${RUN:-runs/arithmetic-$SEED}
ITERATIONS=${ITERATIONS:-16}
[ -n "${PYTHON:-}" ] || { PYTHON=python; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; }     # the quickstart's, if there
export PYTHONPATH=.
if [ -e "$RUN" ]; then
    echo "error: $RUN holds an earlier run. Remove it, or choose another folder: RUN=runs/second bash examples/arithmetic/run.sh" >&2
    exit 1
fi
small=(--dtype fp32 --max_new_tokens 48)

say() { printf '\n== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
evaluate() { "$PYTHON" solver_evaluate.py "${small[@]}" --max_batch_size 256 "$@"; }
ppo() {     # NAME FLAGS...
    local name=$1; shift
    "$PYTHON" ppo_train.py --actor_ckpt_dir "$RUN/sft" --actor_save_dir "$RUN/$name" --train_file "$RUN/prompts.json" --label_file "$RUN/test.json" \
        "${small[@]}" --max_buffer_size 256 --minibatch_size 64 --max_batch_size 64 --rollout_batch_size 256 --eval_batch_size 256 --eval_steps 4 \
        --max_iterations "$ITERATIONS" --epochs 4 --actor_lr 1e-4 --critic_lr 5e-4 --lr_schedule constant --seed "$SEED" "$@"
    evaluate --ckpt_dir "$RUN/$name" --label_file "$RUN/test.json" --log_dir "$RUN/$name-test"
}

say "1. an untrained model and problems"
"$PYTHON" examples/arithmetic/make.py --out_dir "$RUN" --seed "$SEED"

say "2. fine-tuning on demonstrations"
"$PYTHON" solver_train.py --ckpt_dir "$RUN/model" --save_dir "$RUN/sft" --train_file "$RUN/train.json" --max_seq_len 64 --dtype fp32 \
    --lr 2e-3 --max_batch_size 32 --epochs 3 --log_steps 100 --seed "$SEED"
evaluate --ckpt_dir "$RUN/sft" --label_file "$RUN/test.json" --log_dir "$RUN/sft-test"

say "3. a verifier: eight answers to each of 1500 problems, labelled by the rule"
evaluate --ckpt_dir "$RUN/sft" --label_file "$RUN/prompts.json" --limit 1500 --log_dir "$RUN/answers" --num_samples_per_prompt 8 --temperature 1 --seed "$SEED"
"$PYTHON" verifier_train.py --ckpt_dir "$RUN/sft" --save_dir "$RUN/verifier" --train_file "$RUN/answers/samples.jsonl" --loss mse --max_seq_len 64 \
    --dtype fp32 --lr 1e-3 --max_batch_size 64 --seed "$SEED"

say "4. choosing among eight answers to each held-out problem"
evaluate --ckpt_dir "$RUN/sft" --label_file "$RUN/test.json" --log_dir "$RUN/best-of-8" --num_samples_per_prompt 8 --temperature 1 --seed "$SEED" \
    --verifier_ckpt_dir "$RUN/verifier"

say "5. PPO, the rule as the reward"
ppo ppo-rule --algorithm ppo --kl_coef 0.01

say "6. PPO, the verifier as the reward"
# a verifier can be fooled: with 0.01, as above, the policy of seed 3 went where it is wrong, and lost what it had learned
ppo ppo-verifier --algorithm ppo --kl_coef 0.1 --reward_model_ckpt_dir "$RUN/verifier"

say "7. GRPO and RLOO, the rule as the reward"
ppo grpo --algorithm grpo --kl_coef 0.01
ppo rloo --algorithm rloo --kl_coef 0.01

say "all of it on 1000 held-out problems: greedy answers, and best-of-8 of the fine-tuned model"
"$PYTHON" solver_evaluate.py --limit 0 --compare "$RUN/sft-test,$RUN/best-of-8,$RUN/ppo-rule-test,$RUN/ppo-verifier-test,$RUN/grpo-test,$RUN/rloo-test"
"$PYTHON" examples/arithmetic/curves.py "$RUN/ppo-rule" "$RUN/ppo-verifier" "$RUN/grpo" "$RUN/rloo"
say "done; everything is in $RUN"
