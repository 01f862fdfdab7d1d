#!/bin/sh
# Test the scheduler on Ray Serve, which the course's environment does not have: Ray is put beside it, in .venv-ray.
#
# Where Ray cannot be installed, the reason is printed and nothing is tested: that is a success, unless KVLAB_REQUIRE
# names ray.
set -eu
cd "$(dirname "$0")/.."

began=$(date +%s)
if ! said=$(sh scripts/setup.sh --ray 2>&1); then
    printf 'the ray lane was skipped: %s\n' "$said" >&2
    case ",${KVLAB_REQUIRE:-}," in *,ray,*) exit 1 ;; esac
    exit 0
fi
made=$(date +%s)
status=0
KVLAB_REQUIRE="ray${KVLAB_REQUIRE:+,$KVLAB_REQUIRE}" .venv-ray/bin/python -m pytest tests/serve -q -W ignore::DeprecationWarning "$@" || status=$?
minutes() { awk "BEGIN { printf \"%.1f\", $1 / 60 }"; }
echo "minutes: set-up $(minutes $((made - began))), Ray Serve $(minutes $(($(date +%s) - made)))"
exit $status
