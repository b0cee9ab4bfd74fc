# Several domUs at once, all using the xenstored over their rings while dom0's
# clients use the socket.  Variables: COUNT (3), ROUNDS (20), DOMU_TYPE (pv or pvh).
. /lib/xen-vm/dom0.sh
count=${COUNT:-3}
rounds=${ROUNDS:-20}

cat >/tmp/job <<JOB
. /lib/xen-vm/checks.sh
rounds=$rounds
JOB
cat >>/tmp/job <<'JOB'
id=$(xenstore-read domid)
xenstore-write data/state ready
check "dom0 starts the race" wait_for 300 xenstore-exists data/go
other=$(xenstore-read data/other)
check "a neighbour's data cannot be read" fails xenstore-read "$other/data/secret"
check "a neighbour's data cannot be written" fails xenstore-write "$other/data/secret" 1
xenstore-write data/secret "$NAME"

# Every write must show up as one watch event, in the order of the writes.
xenstore-watch -n $((rounds + 1)) data/loop >/tmp/watch &
wait_for 20 grep -q . /tmp/watch
wrong=0 i=1
while [ $i -le "$rounds" ]; do
	xenstore-write "data/loop/$i" "$id-$i" "data/twin/$i" "$id-$i" || wrong=$((wrong + 1))
	[ "$(xenstore-read "data/loop/$i" "data/twin/$i" | tr '\n' ' ')" = "$id-$i $id-$i " ] || wrong=$((wrong + 1))
	i=$((i + 1))
done
check "$rounds rounds of write and read are right" eq "$wrong" 0
check "the watch saw every write" wait_for 30 eq "$(wc -l </tmp/watch)" $((rounds + 1))
check "in order" eq "$(sed -n 's,.*data/loop/,,p' /tmp/watch | tr '\n' ' ')" "$(seq "$rounds" | tr '\n' ' ')"
check "own secret is as written" eq "$(xenstore-read data/secret)" "$NAME"
summary
rc=$?
xenstore-write data/result "$rc"
exit "$rc"
JOB

xenstore-ls -f -p / >/tmp/before
fds=$(subject_fds)
same_fds() { eq "$(subject_fds)" "$fds"; }
names=
for i in $(seq "$count"); do
	names="$names d$i"
	check "xl create d$i" domu_start "d$i" /tmp/job "type='${DOMU_TYPE:-pv}'"
done
for n in $names; do
	check "$n is ready" wait_for 240 xenstore-exists "$(domu_home "$n")/data/state"
done
xl list
begin=$(cut -d. -f1 /proc/uptime)
# Each domU gets its neighbour; that of the last one is the first.
next=$(domu_home d1)
for n in $names; do last=$n; done
xenstore-write "$(domu_home "$last")/data/other" "$next"
prev=
for n in $names; do
	[ -z "$prev" ] || xenstore-write "$(domu_home "$prev")/data/other" "$(domu_home "$n")"
	prev=$n
done
homes=
for n in $names; do homes="$homes $n=$(domu_home "$n")"; done
for h in $homes; do xenstore-write "${h#*=}/data/go" 1; done
check "test-xenstore through the socket meanwhile" test-xenstore
check "test-xenstore through dom0's ring meanwhile" env XENSTORED_PATH=/dev/xen/xenbus test-xenstore
for n in $names; do
	check "$n is done and gone" wait_for 300 domu_gone "$n"
done
tell "the race took $(($(cut -d. -f1 /proc/uptime) - begin)) s"
for n in $names; do
	domu_console "$n"
	check "$n reports success" has "$(domu_log "$n")" "$n: PASS (all"
done
# libxl never removes a few parents; no node of a domU may remain.
xenstore-ls -f -p / >/tmp/after
for h in $homes; do
	check "no node of ${h%%=*} remains" fails grep "${h#*=}\(/\| \)" /tmp/after
done
check "no other domain owns or may read a node" fails grep -E '\((n|.*[rwb])[1-9]' /tmp/after
diff /tmp/before /tmp/after
check "descriptors of the xenstored are back to $fds" wait_for 10 same_fds
tell "xenstored memory: $(subject_rss) KiB"
summary
