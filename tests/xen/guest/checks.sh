# Check helpers shared by dom0 and domU scripts.  Set WHO before sourcing.
passed=0 failed=0
tell() { echo "[$(cut -d' ' -f1 /proc/uptime)] ${WHO}: $*"; }
# check TEXT COMMAND...: one line per check; the command's output only on failure.
check() {
	local text=$1 rc=0
	shift
	"$@" >"/tmp/check.$$" 2>&1 || rc=$?
	if [ "$rc" = 0 ]; then
		passed=$((passed + 1))
		tell "PASS $text"
	else
		failed=$((failed + 1))
		tell "FAIL $text ($* => $rc)"
		sed 's/^/    | /' "/tmp/check.$$"
	fi
}
# Conditions for check.
eq() { [ "$1" = "$2" ] || { echo "got <$1>, want <$2>"; return 1; }; }
fails() { if "$@"; then echo "succeeded, should have failed"; return 1; fi; }
has() { grep -q -- "$2" "$1" || { echo "no <$2> in $1:"; tail -20 "$1"; return 1; }; }
# wait_for SECONDS COMMAND...: try until it succeeds.
wait_for() {
	local end=$(($(cut -d. -f1 /proc/uptime) + $1))
	shift
	until "$@" 2>/dev/null; do
		[ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ] || { echo "timed out: $*"; return 1; }
		sleep 0.2
	done
}
# load SET: the kernel modules of a set that build has put together.
load() {
	local m
	for m in $(cat "/lib/modules/$1"); do insmod "/lib/modules/$m.ko" || return 1; done
}
# summary: last line of a script; its status is the verdict.
summary() {
	if [ "$failed" = 0 ]; then
		tell "PASS (all $passed checks)"
	else
		tell "FAIL ($failed of $((passed + failed)) checks)"
		return 1
	fi
}
