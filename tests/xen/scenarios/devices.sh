# A network and a block device with backends in dom0 are attached and detached through xl while the
# domU runs, and attached from its start. The two kernels connect through the store (the state
# machine of xenbus), with the hotplug scripts of the distribution.
. /lib/xen-vm/dom0.sh

# Waits for the devices, uses them, waits for their removal; twice.
cat >/tmp/job <<'JOB'
. /lib/xen-vm/checks.sh
load devices
exists() { test -e "$1"; }
absent() { ! test -e "$1"; }
xenstore-write data/state ready
for round in 1 2; do
	wait_for 240 exists /sys/class/net/eth0
	ip addr add 10.9.9.2/24 dev eth0
	ip link set eth0 up
	wait_for 120 ping -c 1 -W 2 10.9.9.1 >/dev/null && xenstore-write "data/net/$round" pong
	wait_for 240 absent /sys/class/net/eth0
	wait_for 240 exists /dev/xvdb
	tr -d '\0' </dev/xvdb >/tmp/read
	echo "$NAME was here, round $round" | dd of=/dev/xvdb bs=4096 conv=sync oflag=direct 2>/dev/null
	xenstore-write "data/disk/$round" "$(head -c 100 /tmp/read)"
	wait_for 240 absent /dev/xvdb
done
xenstore-write data/result "$round"
while :; do sleep 10; done
JOB
check "modules for the backends" load devices
check "a bridge" brctl addbr xenbr0
ip addr add 10.9.9.1/24 dev xenbr0
ip link set xenbr0 up
truncate -s 64K /run/disk

state_is() { eq "$(xenstore-read "$1/state")" "$2"; }
value_is() { eq "$(xenstore-read "$1")" "$2"; }
gone() { ! xenstore-exists "$1"; }
same_fds() { eq "$(subject_fds)" "$fds"; }
backend=/local/domain/0/backend
# connected TEXT CLASS DEVICE: both ends of a device of the domU $home
connected() {
	check "$1: the backend is connected" wait_for 240 state_is "$backend/$2/${home##*/}/$3" 4
	check "$1: the frontend is connected" wait_for 240 state_is "$home/device/$2/$3" 4
	check "$1: the hotplug script succeeded" value_is "$backend/$2/${home##*/}/$3/hotplug-status" connected
}
removed() {
	check "$1: the backend leaves no node" wait_for 240 gone "$backend/$2/${home##*/}"
	check "$1: nothing stays of the frontend" wait_for 240 gone "$home/device/$2/$3"
}

fds=$(subject_fds)
check "xl create" domu_start n1 /tmp/job
home=$(domu_home n1)
check "the domU is ready" wait_for 120 xenstore-exists "$home/data/state"
for round in 1 2; do
	check "net $round: xl network-attach" xl network-attach n1 bridge=xenbr0
	connected "net $round" vif 0
	check "net $round: a packet there and back" wait_for 240 value_is "$home/data/net/$round" pong
	check "net $round: xl network-detach" xl network-detach n1 0
	removed "net $round" vif 0
	echo "dom0 was here, round $round" | dd of=/run/disk conv=notrunc 2>/dev/null
	check "disk $round: xl block-attach" xl block-attach n1 format=raw,vdev=xvdb,access=rw,target=/run/disk
	connected "disk $round" vbd 51728
	check "disk $round: the domU reads it" wait_for 240 value_is "$home/data/disk/$round" "dom0 was here, round $round"
	check "disk $round: xl block-detach" xl block-detach n1 xvdb
	removed "disk $round" vbd 51728
	check "disk $round: the domU wrote it" eq "$(tr -d '\0' </run/disk)" "n1 was here, round $round"
done
check "the domU has seen all of it" wait_for 240 value_is "$home/data/result" 2
check "xl destroy" xl destroy n1
check "its home is gone" wait_for 60 gone "$home"

# With devices from the start, removed together with the domain.
check "with devices: xl create" domu_start n2 /tmp/job "vif=['bridge=xenbr0']" \
	"disk=['format=raw,vdev=xvdb,access=rw,target=/run/disk']"
home=$(domu_home n2)
connected "net from the start" vif 0
connected "disk from the start" vbd 51728
check "net from the start: a packet there and back" wait_for 120 value_is "$home/data/net/1" pong
check "with devices: xl destroy" xl destroy n2
removed "net of a destroyed domU" vif 0
removed "disk of a destroyed domU" vbd 51728
check "its home is gone" wait_for 60 gone "$home"
check "descriptors are back to $fds" wait_for 60 same_fds
check "the store still works" test-xenstore
[ "$failed" = 0 ] || { cat /var/log/xen/xen-hotplug.log; domu_console n1; xenstore-ls -f -p $backend; }
tell "xenstored memory: $(subject_rss) KiB"
summary
