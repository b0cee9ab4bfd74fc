# Helpers for scenarios in dom0 with checking clients (counter.sh): one in a domU, on its ring, and
# others in dom0. Source after dom0.sh.

# The job of the domU: it counts, sends its log to dom0 in pieces, and keeps running.
cat >/tmp/counter-job <<'JOB'
sh /lib/xen-vm/counter.sh data /tmp/counter
cd /tmp/counter
for log in steps events; do
	text=$(tr '\n' ' ' <$log)
	n=0
	while [ -n "$text" ]; do
		n=$((n + 1))
		xenstore-write "data/log/$log/$n" "${text:0:1500}"
		text=${text:1500}
	done
	xenstore-write "data/log/$log" $n
done
xenstore-write data/log/done 1
# Run until dom0 requests a shutdown of the kernel by a key.
while :; do sleep 1; done
JOB

# counter_in_domu NAME: starts one and waits until it counts; its home is $home from now on.
counter_in_domu() {
	check "xl create $1" domu_start "$1" /tmp/counter-job
	home=$(domu_home "$1")
	check "$1 counts" wait_for 180 seq_above "$home/data" 2
}
# counter_here NAME [VARIABLE=VALUE...]: starts one in dom0.
counter_here() {
	local name=$1
	shift
	env "$@" sh /lib/xen-vm/counter.sh "/local/domain/0/$name" "/tmp/$name" &
	check "$name counts" wait_for 60 seq_above "/local/domain/0/$name" 2
}
seq_of() { xenstore-read "$1/seq" 2>/dev/null || echo 0; }
seq_above() { [ "$(seq_of "$1")" -gt "$2" ]; }
# more_numbers STEPS BASE...: waits until each has counted this many steps more.
more_numbers() {
	local steps=$1 base marks=
	shift
	for base; do marks="$marks $base=$(seq_of "$base")"; done
	for base in $marks; do
		wait_for 60 seq_above "${base%=*}" $((${base#*=} + steps - 1)) || return 1
	done
}

# counter_ends NAME BASE DIR: ends a client and copies its log into DIR.
counter_ends() {
	local log n
	check "$1 is told to end" xenstore-write "$2/go" 0
	if [ "$1" = domu ]; then
		check "$1 hands over its log" wait_for 180 xenstore-exists "$2/log/done"
		mkdir -p "$3"
		for log in steps events; do
			n=$(xenstore-read "$2/log/$log")
			for n in $(seq "$n"); do xenstore-read "$2/log/$log/$n" | tr -d '\n'; done |
				tr ' ' '\n' >"$3/$log"
		done
	else
		check "$1 ends" wait_for 90 test -e "$3/done"
	fi
	cp -r "$3" "/var/log/xen/$1"
	check "$1: no error, and no gap in its numbers" no_gap "$3"
	check "$1: its watch has told of every step once, in order" all_events "$2" "$3"
	tell "$1: $(last_number "$3") numbers; longest times between two of them: $(longest "$3") ms"
}
last_number() { tail -n 1 "$1/steps" | cut -d: -f2; }
no_gap() {
	grep error "$1/steps" && return 1
	[ "$(last_number "$1")" -gt 10 ] || { echo "only $(last_number "$1") numbers"; return 1; }
	seq "$(last_number "$1")" >/tmp/want
	cut -d: -f2 "$1/steps" | diff /tmp/want -
}
all_events() {
	local place=$1
	case $1 in "$home"/*) place=${1#"$home/"} ;; esac # it watches a relative path
	awk -v place="$place/step" -v n="$(last_number "$2")" \
		'BEGIN { print place; for (i = 1; i <= n; i++) print place "/" i % 64 }' >/tmp/want
	diff /tmp/want "$2/events"
}
# The five longest steps, which show the pauses.
longest() {
	awk -F: 'NR > 1 { print ($1 - last) * 10 } { last = $1 }' "$1/steps" | sort -rn | head -n 5 | tr '\n' ' '
}
