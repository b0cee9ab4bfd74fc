/* A guest that owns its store page. It measures or attacks (see attacks.c). */
#include "client.h"

/* Rounds of a write and a read, each checked, in one window. */
enum { WINDOW = 25 };

/* Measures without end. Prints a line for each window, in microseconds, on the console. */
static void measure(void)
{
	u32 windows = 0, wrong = 0, len;
	char own[16];
	/* Replies for another domain would be wrong here. */
	ask(READ, "domid", sizeof "domid", own, sizeof own, &len);
	own[len % sizeof own] = 0;
	write_node("data/state", "ready");
	for (;;) {
		u32 start = now_us(), longest = 0, round;
		char report[128], *end;
		for (round = 0; round < WINDOW; round++) {
			char value[32];
			u32 before = now_us(), took;
			number(text(text(value, own), "-"), windows * WINDOW + round);
			wrong += !(write_node("data/beat", value) && node_is("data/beat", value));
			took = now_us() - before;
			longest = took > longest ? took : longest;
		}
		end = text(report, "window ");
		end = number(end, ++windows);
		end = text(end, " mean ");
		end = number(end, (now_us() - start) / (2 * WINDOW));
		end = text(end, " longest ");
		end = number(end, longest);
		end = text(end, " wrong ");
		end = number(end, wrong);
		text(end, "\r\n");
		say(report);
	}
}

/* Uses a processor, and not the store. */
static void spin(void)
{
	write_node("data/state", "ready");
	for (;;)
		any();
}

/* Without end: attacks for half a second, reconnects if possible, and checks a reply. */
static void attack(void (*burst)(void))
{
	u32 rounds = 0;
	/* Created before quotas are exhausted. */
	write_node("data/rounds", "0");
	write_node("data/state", can_start_anew() ? "ready, can start anew" : "ready");
	for (;;) {
		char value[16];
		u32 start = now_us();
		while (now_us() - start < 500000)
			burst();
		if (!can_start_anew())
			continue;
		start_anew();
		number(value, ++rounds);
		if (write_node("data/rounds", value) && node_is("data/rounds", value))
			continue;
		say("a wrong answer after a fresh start\r\n");
		power_off();
	}
}

void guest_main(const char *words)
{
	const struct attack *known;
	look_at_features();
	say("up: ");
	say(words);
	say("\r\n");
	if (same(words, "measure", 8))
		measure();
	if (same(words, "spin", 5))
		spin();
	for (known = attacks; known->name; known++)
		if (same(words, known->name, length(known->name) + 1))
			attack(known->burst);
	say("what is that?\r\n");
}
