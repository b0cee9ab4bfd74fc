# A domU that owns its ring attacks. During and after the attack, a second domU and dom0 get correct
# replies in time, and the xenstored releases the resources of the attack.
# Variable: ATTACKS.  Latencies are in microseconds, of emulated machines.
. /lib/xen-vm/dom0.sh
attacks=${ATTACKS:-indices flips frames mutate flood deaf storm}

gone() { ! xenstore-exists "$1"; }
same_fds() { eq "$(subject_fds)" "$fds"; }
above() { [ "$(xenstore-read "$1" || echo 0)" -gt "$2" ]; }

# The other domU writes and reads without a pause; a line for each window, with its longest latency.
windows() { grep -c '^window' "$(domu_log victim)"; }
windows_above() { [ "$(windows)" -gt "$1" ]; }
# dom0_reads: how long 20 clients in dom0 take
dom0_reads() {
	local begin i
	begin=$(awk '{printf "%d", $1 * 100}' /proc/uptime)
	for i in $(seq 10); do
		[ "$(xenstore-read /local/domain/0/name)" = Domain-0 ] || return 1
		[ "$(XENSTORED_PATH=/dev/xen/xenbus xenstore-read /local/domain/0/name)" = Domain-0 ] || return 1
	done
	echo $((($(awk '{printf "%d", $1 * 100}' /proc/uptime) - begin) * 500))
}
# latencies: of windows that begin and end from now on; sets mean, longest, own
latencies() {
	local first
	first=$(windows)
	own=$(dom0_reads)
	wait_for 240 windows_above $((first + 2)) || return 1
	set -- $(grep '^window' "$(domu_log victim)" | tail -n +$((first + 2)) | tr -d '\r' |
		awk '{sum += $4; if ($6 > longest) longest = $6} END {printf "%d %d", sum / NR, longest}')
	mean=$1 longest=$2
}

check "a domU that measures" ring_guest victim measure
check "it is answered" wait_for 120 windows_above 1
fds=$(subject_fds)
rss=$(subject_rss) log=$(wc -c <"$SUBJECT_LOG")

# The emulated processor has bugs: sometimes a triple fault, which no store page can cause. The
# attack is then repeated.
lost() { xl dmesg | grep "d${home##*/}v0 Triple fault"; }
attacks() { xenstore-exists "$home/data/state" || lost; }
is_anew() { above "$home/data/rounds" 3 || lost; }
# attack NAME: fails if its domU was lost; `home` is where it was.
attack() {
	local state
	check "$1: xl create" ring_guest "$1" "$1" "on_reboot='destroy'"
	home=$(domu_home "$1")
	check "$1: it attacks" wait_for 120 attacks
	check "$1: the other domU goes on" latencies
	tell "LATENCY $1: domU mean $mean longest $longest, dom0 $own"
	check "$1: its latency is bounded" [ "$mean" -le $((mean0 * 10 + 50000)) ]
	check "$1: its longest one too" [ "$longest" -le $((longest0 * 10 + 2000000)) ]
	check "$1: and that of dom0" [ "$own" -le $((own0 * 10 + 500000)) ]
	state=$(xenstore-read "$home/data/state")
	case $state in *anew) check "$1: it starts anew and is answered well" wait_for 120 is_anew ;; esac
	lost && return 1
	check "$1: its state can be read" [ -n "$state" ]
	check "$1: it is still there" eq "$(domu_home "$1")" "$home"
	check "$1: xl destroy" xl destroy "$1"
}

for name in $attacks; do
	# First the latencies beside a guest that only uses a processor: machines differ, and vary over
	# time. The bounds distinguish a client that is slowed from one that is not served.
	check "$name: a domU that only spins" ring_guest spin spin
	check "$name: it spins" wait_for 120 xenstore-exists "$(domu_home spin)/data/state"
	latencies
	tell "LATENCY before $name: domU mean $mean longest $longest, dom0 $own"
	mean0=$mean longest0=$longest own0=$own
	xl destroy spin
	tries=1
	until attack "$name" || [ "$((tries += 1))" -gt 5 ]; do
		tell "LOST $name: the domU of domid ${home##*/}; once more"
	done
	check "$name: it came to an end" [ "$tries" -le 5 ]
	check "$name: the store works" test-xenstore
	check "$name: nothing of it stays" wait_for 60 gone "$home"
	check "$name: descriptors are back to $fds" wait_for 60 same_fds
	tell "MEMORY after $name: $(subject_rss) KiB"
done
check "no answer was wrong" fails grep 'wrong [^0]' "$(domu_log victim)"
check "the other domU is still there" wait_for 60 windows_above "$(windows)"
check "memory of the xenstored has not grown (from $rss to $(subject_rss) KiB)" \
	[ "$(subject_rss)" -le $((rss + 2048)) ]
check "nor its log" [ "$(wc -c <"$SUBJECT_LOG")" -le $((log + 65536)) ]
summary
