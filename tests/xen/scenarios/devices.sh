# A block and a network device are attached to a running domU and detached again, by xl
# and with backends in dom0's kernel: the xenbus state machines of two Linux kernels run
# against the xenstored.
. /lib/xen-vm/dom0.sh

cat >/tmp/job <<'JOB'
check "frontend modules" load devices
xenstore-write data/state ready
check "a disk appears" wait_for 120 test -b /dev/xvdb
check "it can be read" eq "$(dd if=/dev/xvdb bs=16 count=1 2>/dev/null)" "0123456789abcdef"
printf fedcba9876543210 | dd of=/dev/xvdb bs=16 count=1 conv=fsync,notrunc 2>/dev/null
xenstore-write data/disk written
check "the disk goes again" wait_for 120 fails test -b /dev/xvdb
xenstore-write data/disk gone
check "a network device appears" wait_for 120 test -d /sys/class/net/eth0
xenstore-write data/net there
check "the network device goes again" wait_for 120 fails test -d /sys/class/net/eth0
xenstore-write data/net gone
summary
JOB

# In place of the scripts that would put the interface on a bridge, and look for other
# users of the disk: they want more tools than dom0 has here.
cat >/run/vif-alone <<'SCRIPT'
#!/bin/sh
[ "$1" != online ] || xenstore-write "$XENBUS_PATH/hotplug-status" connected
SCRIPT
cat >/run/block-alone <<'SCRIPT'
#!/bin/sh
[ "$1" = add ] || exit 0
xenstore-write "$XENBUS_PATH/physical-device" 7:0
xenstore-write "$XENBUS_PATH/hotplug-status" connected
SCRIPT
chmod +x /run/vif-alone /run/block-alone

fds=$(subject_fds)
same_fds() { eq "$(subject_fds)" "$fds"; }
state() { eq "$(xenstore-read "$1/state")" "$2"; }
domu_says() { eq "$(xenstore-read "$home/data/$1")" "$2"; }

check "backend modules" load devices
{
	printf 0123456789abcdef
	dd if=/dev/zero bs=1M count=1
} >/run/disk 2>/dev/null
loop=$(losetup -f)
check "a loop device" losetup "$loop" /run/disk

check "xl create" domu_start dev /tmp/job
id=$(domu_id dev) home=$(domu_home dev)
check "the domU is ready" wait_for 120 xenstore-exists "$home/data/state"

front=$home/device/vbd/51728 back=/local/domain/0/backend/vbd/$id/51728
check "xl block-attach" xl block-attach dev "format=raw,vdev=xvdb,access=rw,script=/run/block-alone,target=$loop"
check "the disk's backend is connected" wait_for 60 state "$back" 4
check "the disk's frontend is connected" wait_for 60 state "$front" 4
check "the domU has written to the disk" wait_for 60 domu_says disk written
check "the file behind it has changed" eq "$(dd if="$loop" bs=16 count=1 2>/dev/null)" fedcba9876543210
check "xl block-detach" xl block-detach dev xvdb
check "the domU has lost the disk" wait_for 60 domu_says disk gone
check "its frontend is gone from the store" wait_for 60 fails xenstore-exists "$front"
check "its backend is gone from the store" wait_for 60 fails xenstore-exists "$back"

front=$home/device/vif/0 back=/local/domain/0/backend/vif/$id/0
check "xl network-attach" xl network-attach dev script=/run/vif-alone
check "the network's backend is connected" wait_for 60 state "$back" 4
check "the network's frontend is connected" wait_for 60 state "$front" 4
check "the domU has the network device" wait_for 60 domu_says net there
check "xl network-detach" xl network-detach dev 0
check "the network's frontend is gone from the store" wait_for 60 fails xenstore-exists "$front"
check "the network's backend is gone from the store" wait_for 60 fails xenstore-exists "$back"
check "the domU is done and gone" wait_for 120 domu_gone dev
domu_console dev
check "it reports success" has "$(domu_log dev)" "dev: PASS (all"
check "descriptors are back to $fds" wait_for 20 same_fds
summary
