# A domU is migrated to the same host, with a second xl as receiver: for a while two domains have one
# uuid. Its kernel finds the new ring, and its watch works.
# PVH, as the hypervisor cannot log what a PV domU writes (Debian's has no shadow paging).
. /lib/xen-vm/dom0.sh

cat >/tmp/beat <<'JOB'
i=0
while :; do
	i=$((i + 1))
	xenstore-write data/beat $i
done
JOB
same_fds() { eq "$(subject_fds)" "$fds"; }
gone() { ! xenstore-exists "$1"; }
owned_by() { xenstore-ls -f -p / | grep "[(,][a-z]$1[,)]"; }
beat_is_above() { [ "$(xenstore-read "$1/data/beat" || echo 0)" -gt "$2" ]; }
fds=$(subject_fds)

check "xl create" domu_start m1 /tmp/beat "type='pvh'"
old=$(domu_home m1)
check "the domU is writing" wait_for 240 beat_is_above "$old" 3
check "xl migrate to this very host" xl migrate -s '' m1 'xl migrate-receive'
new=$(domu_home m1)
check "it has a new domid" fails eq "$old" "$new"
check "its old home is gone" wait_for 60 gone "$old"
check "no node belongs to its old domid" fails owned_by "${old##*/}"
beat=$(xenstore-read "$new/data/beat")
check "it goes on writing" wait_for 120 beat_is_above "$new" "${beat:-0}"
check "its kernel still watches control/shutdown" xl shutdown -w m1
check "its new home is gone" wait_for 60 gone "$new"
check "no node belongs to its new domid" fails owned_by "${new##*/}"
check "descriptors are back to $fds" wait_for 60 same_fds
check "the store still works" test-xenstore
tell "xenstored memory: $(subject_rss) KiB"
summary
