# A domU is destroyed in a transaction: none of its changes become visible, its nodes are removed, and
# the xenstored releases descriptors and memory.
. /lib/xen-vm/dom0.sh

# Transactions through the kernel's device, in shell: no tool leaves a transaction open.
cat >/tmp/job <<'JOB'
word() { printf "\\$(printf %o $(($1 & 255)))\\$(printf %o $(($1 >> 8 & 255)))\\0\\0"; }
# request TYPE TX PAYLOAD-FILE: ask, and put the payload of the answer into /tmp/answer
request() {
	{ word "$1"; word 7; word "$2"; word "$(stat -c %s "$3")"; cat "$3"; } >/tmp/request
	cat /tmp/request >&3
	len=$(dd bs=16 count=1 <&3 2>/dev/null | od -An -tu4 -j12 | tr -d ' ')
	: >/tmp/answer
	[ "$len" = 0 ] || dd bs="$len" count=1 <&3 >/tmp/answer 2>/dev/null
}
exec 3<>/dev/xen/xenbus
xenstore-write data/before 1
printf '\0' >/tmp/payload
request 6 0 /tmp/payload
tx=$(tr -d '\0' </tmp/answer)
printf 'data/inside\0%s' 1 >/tmp/payload
request 11 "$tx" /tmp/payload
printf 'data/before\0%s' 2 >/tmp/payload
request 11 "$tx" /tmp/payload
xenstore-write data/state "in transaction $tx: $(tr -d '\0' </tmp/answer)"
while :; do sleep 1; done
JOB
same_fds() { eq "$(subject_fds)" "$fds"; }
owned_by() { xenstore-ls -f -p / | grep "[(,][a-z]$1[,)]"; }
xenstore-watch @releaseDomain >/tmp/release &
wait_for 10 grep -q . /tmp/release
fds=$(subject_fds) # with that watcher's

round() {
	check "$1: xl create" domu_start "t$1" /tmp/job
	home=$(domu_home "t$1")
	check "$1: it is in a transaction" wait_for 120 xenstore-exists "$home/data/state"
	check "$1: its answers are right" eq "$(xenstore-read "$home/data/state" | sed 's/[0-9]*:/N:/')" "in transaction N: OK"
	check "$1: what it writes inside is not seen" fails xenstore-exists "$home/data/inside"
	check "$1: nor what it changes" eq "$(xenstore-read "$home/data/before")" 1
	before=$(wc -l </tmp/release)
	check "$1: a transaction of dom0 meanwhile" test-xenstore
	check "$1: xl destroy" xl destroy "t$1"
	check "$1: @releaseDomain fired" wait_for 20 more_released "$before"
	check "$1: its home is gone" wait_for 20 fails xenstore-exists "$home"
	check "$1: no node belongs to it" fails owned_by "${home##*/}"
	check "$1: descriptors are back to $fds" wait_for 20 same_fds
}
round 1
rss=$(subject_rss)
round 2
round 3
check "memory of the xenstored has not grown (from $rss to $(subject_rss) KiB)" \
	[ "$(subject_rss)" -le $((rss + 512)) ]
summary
