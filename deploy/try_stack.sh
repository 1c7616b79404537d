#!/usr/bin/env bash
# Tries the compose stack as its user would: build it, bring it up, stream an answer from outside, kill the engine that
# is in the middle of an answer and see that answer go on, stream another one, take the stack down.
#
#     make try-stack          KEEP=1 leaves the stack up; with Podman: DOCKER=podman COMPOSE=podman-compose
#
# Ends with 0 only if the answer that lost its engine is, to the letter, the one that was left in peace.
set -euo pipefail
cd "$(dirname "$0")/.."

DOCKER=${DOCKER:-docker}
COMPOSE=${COMPOSE:-docker compose}
HOLDFAST=${HOLDFAST:-.venv/bin/holdfast}
READY_SECONDS=${READY_SECONDS:-300}
PROMPT="Once upon a time, in a small village by the sea,"
OPTIONS=(--temperature 0 --max-tokens 200)

export HOLDFAST_ADDRESS="127.0.0.1:${GRPC_PORT:-50051}"

compose() { $COMPOSE -f deploy/compose.yaml "$@"; }
say() { printf '\n== %s\n' "$*"; }
fail() { printf '\ntry_stack: %s\n' "$*" >&2; exit 1; }

finish() {
    local code=$?
    if [ "$code" -ne 0 ]; then
        say "what the services said last"
        compose logs --tail 30 2>&1 || true
    fi
    if [ -z "${KEEP:-}" ]; then
        say "taking the stack down"
        compose down --volumes
    fi
    rm -f "$peaceful" "$disturbed" "$after"
    exit "$code"
}

# Waits until a command succeeds, or gives up after so many seconds.
await() {
    local seconds=$1 deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || fail "not within $seconds s: $*"
        sleep 1
    done
}

engines() {
    $DOCKER ps --quiet --filter label=com.docker.compose.project=holdfast --filter label=com.docker.compose.service=engine
}

status_of() {
    $DOCKER exec "$1" python -m holdfast.cli --address gateway:50051 status --engine 127.0.0.1:50053
}

# Whether two engines, at least, say that they serve.
two_engines() {
    local engine serving=0
    for engine in $(engines); do
        if status_of "$engine"; then serving=$((serving + 1)); fi
    done
    [ "$serving" -ge 2 ]
}

# The engine that runs a sequence now, as it says itself.
busy_engine() {
    local engine
    for engine in $(engines); do
        if status_of "$engine" | grep -qE ' [1-9][0-9]* of [0-9]+ sequences run'; then
            echo "$engine"
            return
        fi
    done
    return 1
}

command -v "$HOLDFAST" >/dev/null || fail "there is no $HOLDFAST; 'make setup' makes it, or HOLDFAST names another"

peaceful=$(mktemp)
disturbed=$(mktemp)
after=$(mktemp)
trap finish EXIT

say "building and starting"
compose up --build --detach

say "waiting for the gateway and two engines"
await "$READY_SECONDS" "$HOLDFAST" status
await "$READY_SECONDS" two_engines
"$HOLDFAST" status

say "an answer, left in peace"
"$HOLDFAST" generate "$PROMPT" "${OPTIONS[@]}" | tee "$peaceful"

say "the same, and its engine killed in the middle of it"
"$HOLDFAST" generate "$PROMPT" "${OPTIONS[@]}" >"$disturbed" &
answer=$!
await 60 test -s "$disturbed"
engine=$(busy_engine) || fail "no engine runs the request"
$DOCKER kill "$engine"
before=$(wc -c <"$disturbed")
[ "$before" -lt "$(wc -c <"$peaceful")" ] || fail "the answer had ended before $engine was killed: ask for more tokens"
say "engine $engine killed after $before bytes of the answer; waiting for the rest from the other engine"
wait "$answer" || fail "the answer broke"
cat "$disturbed"
cmp "$peaceful" "$disturbed" || fail "the answer is not the one that was left in peace"

say "another answer, from the engine that is left"
"$HOLDFAST" generate "The capital of France is" "${OPTIONS[@]}" --max-tokens 20 | tee "$after"
[ -s "$after" ] || fail "an empty answer"

say "the stack kept its promise: accepted, the answer outlived its engine"
