# The xenstored is killed repeatedly (KILLS, 20) and restarted as by systemd (run with -r), while a
# domU and dom0's kernel count on their rings and check every reply and event. Every fifth time the
# next process is killed as well, as soon as it runs, and at the end during xl create. Its event
# channels are stored in the first half of the kills (if the program that starts it can do so).
# Clients of the socket lose their connection: xenconsoled is restarted, and what xl leaves behind
# is removed.
. /lib/xen-vm/dom0.sh
. /lib/xen-vm/counters.sh
kills=${KILLS:-20}

next_pid() { pid=$(subject_pid) && [ "$pid" != "$1" ]; }
answers() { timeout 5 env XENSTORED_PATH=/run/xenstored/socket xenstore-exists /; }
# Without wait_for, which sleeps between two tries.
await_next() { until next_pid "$1"; do :; done; }
hit() { # TEXT [twice]
	local first
	first=$(subject_pid)
	kill -9 "$first"
	await_next "$first"
	if [ "$2" = twice ]; then
		first=$pid
		kill -9 "$first"
		await_next "$first"
	fi
	check "$1: the next one answers" wait_for 20 answers
}

# It serves its consoles, and gets no events for new domains.
console_again() {
	local pid
	pid=$(cat /run/xen/xenconsoled.pid)
	kill "$pid"
	wait_for 10 fails kill -0 "$pid" >/dev/null
	check "xenconsoled starts again" console_up
}

XENSTORED_PATH=/dev/xen/xenbus xenstore-watch @releaseDomain >/tmp/release &
wait_for 10 grep -q . /tmp/release
counter_in_domu d1
counter_here ring XENSTORED_PATH=/dev/xen/xenbus
for n in $(seq "$kills"); do
	[ "$n" != $((kills / 2 + 1)) ] || touch /run/fdstore/forget
	twice=
	[ $((n % 5)) != 0 ] || twice=twice
	hit "kill $n $twice" $twice
	check "kill $n: the domU and dom0's ring count on" more_numbers 2 "$home/data" /local/domain/0/ring
done
check "xenstore-control check" eq "$(xenstore-control check)" OK
tell "$(subject_fds) descriptors, $(subject_rss) KiB"

rm -f /run/fdstore/forget

# xl may fail, and usually does; the host must not.
echo 'xenstore-write data/state ready; while :; do sleep 1; done' >/tmp/job
for delay in 0.5 2; do
	console_again
	timeout 90 sh -c '. /lib/xen-vm/dom0.sh; domu_start lost /tmp/job' >/tmp/create 2>&1 &
	create=$!
	sleep $delay
	hit "kill $delay s into xl create"
	wait $create
	tell "xl create ended with $?"
	sed 's/^/    | /' /tmp/create
	if domu_id lost; then check "xl destroy of what is left" xl destroy lost; fi
	check "kill $delay s into xl create: it is gone" wait_for 30 domu_gone lost
	check "kill $delay s into xl create: the domU counts on" more_numbers 2 "$home/data"
done

counter_ends domu "$home/data" /tmp/domu
counter_ends ring /local/domain/0/ring /tmp/ring

console_again
released=$(wc -l </tmp/release)
check "xl shutdown of the domU" xl shutdown d1
check "@releaseDomain fired" wait_for 60 more_released "$released"
# The xl that waited for this was a client of the socket.
if domu_id d1; then check "xl destroy of the rest" xl destroy d1; fi
check "its home is gone" wait_for 20 fails xenstore-exists "$home"
check "xl create of a new one" domu_start d2 /tmp/job
check "it uses its store" wait_for 180 xenstore-exists "$(domu_home d2)/data/state"
home=$(domu_home d2)
check "xl destroy" xl destroy d2
check "its home is gone" wait_for 20 fails xenstore-exists "$home"
check "xenstore-control check at the end" eq "$(xenstore-control check)" OK
grep -a "recovered its journal\|taken over\|executed this input\|reconnected\|fdstore\|were stored\|cannot" "$SUBJECT_LOG"
stored() { grep -ac "event channels were stored adopted=[2-9]" "$SUBJECT_LOG"; }
if command -v fdstore >/dev/null; then
	check "event channels were stored in the first half of the kills" test "$(stored)" -ge $((kills / 2))
fi
summary
