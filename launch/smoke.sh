#!/usr/bin/env bash
# The main job at laptop size: data, three stages, evaluation, report. Arguments are passed on as overrides.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec .venv/bin/python -m train recipe=smoke "$@"
