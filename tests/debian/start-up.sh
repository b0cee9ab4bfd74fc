#!/bin/sh
# start-up.sh DIRECTORY DAEMON: Debian's scripts start a daemon as the package that is unpacked in
# DIRECTORY. DAEMON replaces the package's daemon: it is built with --pretend-xen. Run this as root
# in new mount and process namespaces: nothing outside of them changes, and all processes end with
# it. Without Xen, three programs that need it are replaced, and so is /proc/xen, which cannot be
# created.
set -eu
package=$(realpath "$1")
daemon_for_tests=$(realpath "$2")

mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys
layer=/run/layer
mkdir -p /run/proc-xen /run/lock /sys/hypervisor/version "$layer"
mkdir -p $layer/lib/xen-4.17/bin $layer/default $layer/bin /run/pretend/0
echo control_d >/run/proc-xen/capabilities
echo xen >/sys/hypervisor/type
echo 4 >/sys/hypervisor/version/major
echo 17 >/sys/hypervisor/version/minor
echo 1 >/run/pretend/0/port
cp -r "$package/usr/lib/xenstored" $layer/lib/
cp "$daemon_for_tests" $layer/lib/xenstored/xenstored

# program PATH: creates a shell script from standard input.
program() {
	{ echo '#!/bin/sh' && cat; } >"$1"
	chmod 755 "$1"
}
program $layer/lib/xen-4.17/bin/xen-init-dom0 <<-'EOF'
	xenstore-write /local/domain/0/name Domain-0 && echo xen-init-dom0 >>/run/order
EOF
program $layer/lib/xen-4.17/bin/xenconsoled <<-'EOF'
	echo "xenconsoled after $(xenstore-read /local/domain/0/name)" >>/run/order
EOF
program $layer/lib/xen-4.17/bin/oxenstored <<-'EOF'
	echo oxenstored >>/run/order
	exit 1
EOF
cp $layer/lib/xen-4.17/bin/oxenstored $layer/lib/xen-4.17/bin/xenstored
program $layer/bin/systemctl <<-'EOF'
	echo "systemctl $*" >>/run/order
EOF
over() { mount -t overlay overlay -o "ro,lowerdir=$layer/$1:$2" "$2"; }
over lib /usr/lib
over default /etc/default
over bin /usr/bin

# The score of the out-of-memory killer: below 0 needs a privilege.
score=-1000
choom -n -1000 true 2>/dev/null || score=500
sed -e 's,/proc/xen,/run/proc-xen,g' -e "s,-n -1000,-n $score," /etc/init.d/xen >/run/init
daemon=/usr/lib/xenstored/xenstored
fail() {
	echo "FAIL $*" >&2
	cat /run/order >&2
	exit 1
}
pass() { echo "ok   $*"; }
# is_daemon PIDFILE: succeeds if the file has the process id of our daemon.
is_daemon() { [ "$(readlink "/proc/$(cat "$1")/exe")" = $daemon ]; }
# config FILE LINE...
config() {
	file=$layer/default/$1
	shift
	printf '%s\n' "$@" >"$file"
	umount /etc/default && over default /etc/default
}
# stop PIDFILE: stops the daemon, which then unlocks and removes the file.
stop() { pid=$(cat "$1") && kill "$pid" && flock "$1" true; }
# condition: succeeds if the conditions of the unit allow a start.
condition() {
	sed -n "s,^ExecCondition=/bin/sh -c '\(.*\)'$,\1,p" "$package/usr/lib/systemd/system/xenstored.service" |
		sed 's/\$\$/$/g' >/run/condition
	[ -s /run/condition ] && sh /run/condition
}

config xen 'XENSTORED_ARGS='
: >/run/order
sh /run/init start >/dev/null 2>&1 || :
[ "$(sort -u /run/order)" = oxenstored ] || fail "the package changes what a host starts"
! condition || fail "the unit would start beside Debian's daemon"
pass "a host that was not told starts its own daemon, and the unit does not start"

args='XENSTORED_ARGS="--pretend-xen /run/pretend"'
config xen "XENSTORED=/usr/lib/xenstored/start" "$args"
: >/run/order
sh /run/init start >/run/out 2>&1 || fail "/etc/init.d/xen: $(cat /run/out)"
is_daemon /run/xenstore.pid || fail "the pid file is not the daemon's"
first=$(cat /run/xenstore.pid)
[ "$(cat "/proc/$first/oom_score_adj")" = $score ] || fail "score of the out-of-memory killer"
[ "$(cat /run/order)" = "$(printf 'xen-init-dom0\nxenconsoled after Domain-0')" ] || fail "order"
condition || fail "the unit would not start"
pass "/etc/init.d/xen starts it, then xen-init-dom0, then xenconsoled"

: >/run/order
sh /run/init start >/run/out 2>&1 || fail "/etc/init.d/xen, again: $(cat /run/out)"
[ "$(cat /run/xenstore.pid)" = "$first" ] || fail "another daemon"
grep -q xenconsoled /run/order || fail "a second start does not get to xenconsoled"
pass "a second start leaves it alone and goes on"

: >/run/order
mkdir -p /run/systemd/system
sh /run/init start >/run/out 2>&1 || fail "/etc/init.d/xen with systemd: $(cat /run/out)"
grep -qx 'systemctl start xenstored.service' /run/order || fail "systemd is not asked"
rm -r /run/systemd
pass "with systemd, the script starts the unit"
stop /run/xenstore.pid

# A score that falls from 500 to 0, and the present limit of descriptors, need no privilege.
config xencommons "XENSTORED=$daemon" "$args" XENSTORED_OOM_MEM_THRESHOLD=0 \
	"XENSTORED_MAX_OPEN_FDS=$(ulimit -Hn)"
choom -n 500 -- /etc/xen/scripts/launch-xenstore >/run/out 2>&1 || fail "launch-xenstore: $(cat /run/out)"
is_daemon /run/xen/xenstored.pid || fail "launch-xenstore: the pid file is not the daemon's"
[ "$(cat "/proc/$(cat /run/xen/xenstored.pid)/oom_score_adj")" = 0 ] || fail "launch-xenstore: score"
xenstore-read -s / >/dev/null || fail "launch-xenstore: it does not answer"
pass "launch-xenstore starts it"
