#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Two minutes of the chaos suite with the shipped model; `make chaos` and `make chaos-long` run more.
# Runs alone: three brokers and three workers are load enough.
SECONDS_OF_FAULTS=${SECONDS_OF_FAULTS:-80} PAUSE=1 exec "$(dirname "$0")/../chaos/run"
