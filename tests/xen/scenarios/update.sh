# Live updates from one program to the next, by Debian's xenstore-control, while three clients
# count and check every reply and event: a domU on its ring, and in dom0 one on the kernel's ring and
# one on the socket. An older domU is shut down afterwards, and a new one is started.
# Variable: WAY, the programs after the one that runs, of: c, ours (which is the one that runs, or
# was added with -d).
. /lib/xen-vm/dom0.sh
. /lib/xen-vm/counters.sh
c=$(readlink -f /usr/lib/xen)/bin/xenstored
ours=/usr/local/bin/xenstored
case $SUBJECT in
*/oxenstored) way=${WAY:-ours ours} ;;
/usr/lib/*) way=${WAY:-ours ours c} ;;
*) way=${WAY:-c ours ours} ours=$SUBJECT ;;
esac

update() {
	local pid
	pid=$(subject_pid)
	check "$1: xenstore-control live-update" xenstore-control live-update -t 60 "$2"
	subject_is "$2"
	check "$1: it is the same process" eq "$(subject_pid)" "$pid"
	check "$1: all three count on" more_numbers 5 "$home/data" /local/domain/0/ring /local/domain/0/socket
	check "$1: xl list" xl list
	[ "$2" = $c ] || check "$1: xenstore-control check" eq "$(xenstore-control check)" OK
	tell "$1: $(subject_fds) descriptors, $(subject_rss) KiB"
}

xenstore-watch @releaseDomain >/tmp/release &
wait_for 10 grep -q . /tmp/release
counter_in_domu d1
counter_here ring XENSTORED_PATH=/dev/xen/xenbus
counter_here socket
from=${SUBJECT##*/}
[ "$SUBJECT" != $ours ] || from=ours
for to in $way; do
	case $to in c) file=$c ;; *) file=$ours ;; esac
	update "$from -> $to" $file
	from=$to
done
counter_ends domu "$home/data" /tmp/domu
counter_ends ring /local/domain/0/ring /tmp/ring
counter_ends socket /local/domain/0/socket /tmp/socket

released=$(wc -l </tmp/release)
check "xl shutdown of the domU" xl shutdown d1
check "the domU is gone" wait_for 60 domu_gone d1
check "@releaseDomain fired" wait_for 20 more_released "$released"
check "its home is gone" wait_for 20 fails xenstore-exists "$home"
echo 'xenstore-write data/state ready; while :; do sleep 1; done' >/tmp/job
check "xl create of a new one" domu_start d2 /tmp/job
check "it uses its store" wait_for 180 xenstore-exists "$(domu_home d2)/data/state"
check "xl destroy" xl destroy d2
grep -a "taken over" "$SUBJECT_LOG"
summary
