#include "client.h"

static u32 last_id;
static u32 features;

static void send(const void *bytes, u32 count)
{
	const u8 *next = bytes;
	while (count) {
		u32 room = 1024 - (store->req_prod - store->req_cons);
		if (!room) {
			kick();
			wait_event();
			continue;
		}
		for (; room && count; room--, count--) {
			store->req[store->req_prod % 1024] = *next++;
			fence();
			store->req_prod++;
		}
	}
}

static void receive(void *bytes, u32 count)
{
	u8 *next = bytes;
	while (count) {
		if (store->rsp_prod == store->rsp_cons) {
			wait_event();
			continue;
		}
		*next++ = store->rsp[store->rsp_cons % 1024];
		fence();
		store->rsp_cons++;
		count--;
	}
}

u32 ask(u32 type, const void *payload, u32 len, void *answer, u32 size, u32 *answer_len)
{
	struct header header = { type, ++last_id, 0, len };
	u32 kept;
	send(&header, sizeof header);
	send(payload, len);
	kick();
	for (;;) {
		receive(&header, sizeof header);
		kept = header.len < size ? header.len : size;
		receive(answer, kept);
		for (len = kept; len < header.len; len++) {
			u8 dropped;
			receive(&dropped, 1);
		}
		/* Watch events of an earlier attack have id 0. */
		if (header.req_id == last_id)
			break;
	}
	kick(); /* the ring has space again */
	*answer_len = header.len;
	return header.type;
}

int write_node(const char *path, const char *value)
{
	char payload[256], answer[16];
	u32 len = length(path) + 1, answer_len;
	copy(payload, path, len);
	copy(payload + len, value, length(value));
	return ask(WRITE, payload, len + length(value), answer, sizeof answer, &answer_len) == WRITE;
}

int node_is(const char *path, const char *value)
{
	char answer[256];
	u32 answer_len;
	u32 type = ask(READ, path, length(path) + 1, answer, sizeof answer, &answer_len);
	return type == READ && answer_len == length(value) && same(answer, value, answer_len);
}

void look_at_features(void)
{
	features = store->server_features;
}

int can_start_anew(void)
{
	return features & FEATURE_RECONNECT;
}

void start_anew(void)
{
	if (!can_start_anew())
		return;
	store->connection = 1;
	kick();
	while (store->connection)
		wait_event();
}
