#!/bin/sh
# Test the connectors with engines that the course's environment does not have: vLLM, in an environment of its own,
# and the newest transformers, in a folder beside it.
#
# Where the environment cannot be made, the reason is printed and nothing is tested: that is a success, unless
# KVLAB_REQUIRE names engines.
set -eu
cd "$(dirname "$0")/.."

newest=transformers==5.24.0
folder=.venv-engines/newest

began=$(date +%s)
if ! said=$(sh scripts/setup.sh --engines 2>&1); then
    printf 'the engines lane was skipped: %s\n' "$said" >&2
    case ",${KVLAB_REQUIRE:-}," in *,engines,*) exit 1 ;; esac
    exit 0
fi
if [ "$(cat $folder/.ready 2>/dev/null)" != "$newest" ]; then
    rm -rf $folder
    if said=$(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $folder $newest 2>&1); then
        echo "$newest" >$folder/.ready
    else
        printf 'the newest transformers was skipped: %s\n' "$said" >&2
        case ",${KVLAB_REQUIRE:-}," in *,engines,*) exit 1 ;; esac
    fi
fi
made=$(date +%s)
KVLAB_REQUIRE=engines .venv-engines/bin/python -m pytest tests/engines -q "$@"
tested=$(date +%s)
[ -e $folder/.ready ] && KVLAB_REQUIRE=hf PYTHONPATH=$folder .venv/bin/python -m pytest tests/connectors -m hf -q "$@"
printf 'minutes: set-up %s, vLLM %s, newest transformers %s\n' \
    "$(((made - began) / 60))" "$(((tested - made) / 60))" "$((($(date +%s) - tested) / 60))"
