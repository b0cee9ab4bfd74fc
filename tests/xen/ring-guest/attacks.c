#include "client.h"

enum { STEPS = 200 };

/* Writes bytes at the place of the next request, without regard to what the daemon has read. */
static void place(u32 at, const void *bytes, u32 count)
{
	u32 i;
	for (i = 0; i < count; i++)
		store->req[(at + i) % 1024] = ((const u8 *)bytes)[i];
}

/* Invalid indices, each for long enough to be read. */
static void indices(void)
{
	static const u32 wrong[] = { 1025, 5000, 0x7fffffff, 0x80000000, 0xfffffc00, 0xffffffff };
	u32 by = wrong[any() % 6];
	if (any() & 1)
		store->req_prod = store->req_cons + by;
	else
		store->rsp_cons = store->rsp_prod + by;
	kick();
}

/* All words of the page change all the time. */
static void flips(void)
{
	volatile u32 *words = &store->req_cons;
	u32 i;
	for (i = 0; i < STEPS; i++) {
		u32 word = any() % 7;
		words[word] = any() & 1 ? any() : any() & 1 ? words[any() % 4] : any() % 2048;
		if (!(i % 16))
			kick();
	}
}

/* Invalid headers, then random bytes, with valid indices. */
static void frames(void)
{
	struct header header = { any() % 32, any(), any() & 1 ? any() : 0, 0 };
	u32 count = sizeof header + any() % 512, i, at;
	header.len = any() & 1 ? 4097 + any() % 4096 : any() & 1 ? any() : any() % 512;
	for (i = 0; i < STEPS && store->req_prod - store->req_cons; i++)
		kick();
	at = store->req_prod;
	place(at, &header, sizeof header);
	for (i = sizeof header; i < count; i++)
		store->req[(at + i) % 1024] = any();
	fence();
	store->req_prod = at + count;
	kick();
	if (!(any() % 8))
		start_anew();
}

/* Valid requests that change while the daemon reads them. */
static void mutate(void)
{
	static const char path[] = "data/mutating";
	struct header header = { WRITE, 1, 0, sizeof path + 10 };
	u32 at = store->req_prod, i;
	if (at - store->req_cons > 1024 - sizeof header - header.len) {
		kick();
	} else {
		place(at, &header, sizeof header);
		place(at + sizeof header, path, sizeof path);
		fence();
		store->req_prod = at + sizeof header + header.len;
		kick();
		for (i = 0; i < STEPS; i++)
			store->req[(at + any() % (sizeof header + header.len)) % 1024] = any();
	}
	store->rsp_cons = store->rsp_prod;
	if (!(any() % 16))
		start_anew();
}

/* Requests at full speed, with replies and events discarded: nodes and watches up to the quota, and
 * lists of all of them. */
static void flood(void)
{
	u32 i;
	for (i = 0; i < STEPS; i++) {
		char payload[64], *end = text(payload, any() & 1 ? "data/flood/" : "data/");
		struct header header = { any() & 3 ? WRITE : any() & 1 ? WATCH : DIRECTORY, 1, 0, 0 };
		u32 at = store->req_prod;
		end = number(end, any() % 5000) + 1;
		*end++ = 't';
		*end++ = 0;
		header.len = header.type == DIRECTORY ? length(payload) + 1 : (u32)(end - payload);
		if (at - store->req_cons <= 1024 - sizeof header - header.len) {
			place(at, &header, sizeof header);
			place(at + sizeof header, payload, header.len);
			fence();
			store->req_prod = at + sizeof header + header.len;
		}
		store->rsp_cons = store->rsp_prod;
		kick();
	}
}

/* The same, but replies are never read. */
static void deaf(void)
{
	static const char path[] = "data";
	struct header header = { DIRECTORY, 1, 0, sizeof path };
	u32 i;
	for (i = 0; i < STEPS; i++) {
		u32 at = store->req_prod;
		if (at - store->req_cons <= 1024 - sizeof header - sizeof path) {
			place(at, &header, sizeof header);
			place(at + sizeof header, path, sizeof path);
			fence();
			store->req_prod = at + sizeof header + sizeof path;
		}
		kick();
	}
}

/* Sends events without requests. */
static void storm(void)
{
	u32 i;
	for (i = 0; i < STEPS; i++)
		kick();
}

const struct attack attacks[] = {
	{ "indices", indices }, { "flips", flips }, { "frames", frames }, { "mutate", mutate },
	{ "flood", flood }, { "deaf", deaf }, { "storm", storm }, { 0, 0 },
};
