#!/bin/sh
# Make the environment with vLLM and run the engines lane in it, then the tests of transformers on its newest version.
#
# Where the environment cannot be made, the reason is printed and nothing is tested: that is a success, unless
# KVLAB_REQUIRE names engines.
set -eu
cd "$(dirname "$0")/.."

began=$(date +%s)
if ! said=$(sh scripts/setup.sh --engines 2>&1); then
    printf 'the engines lane was skipped: %s\n' "$said" >&2
    case ",${KVLAB_REQUIRE:-}," in *,engines,*) exit 1 ;; esac
    exit 0
fi
made=$(date +%s)
KVLAB_REQUIRE=engines .venv-engines/bin/python -m pytest tests/engines -q "$@"
printf 'minutes: engines %s, of these set-up: %s\n' "$((($(date +%s) - began) / 60))" "$(((made - began) / 60))"
