#!/usr/bin/env bash
# Makes the environment with the test extras and runs the test-suite; arguments go to pytest. The slow tests too:
#
#   bash scripts/test.sh -m "slow or not slow"

source "$(dirname "$0")/environment.sh"
install_litpeft "[test]"
echo "== pytest"
exec .venv/bin/python -m pytest "$@"
