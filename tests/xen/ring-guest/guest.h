/* The part of Xen that a guest without an operating system needs: PVH entry, hypercalls,
 * its store page, its console. 32 bit, no paging, one processor; public headers are not needed. */
#ifndef RING_GUEST_H
#define RING_GUEST_H

#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

/* xs_wire.h: struct xenstore_domain_interface. */
struct store_page {
	u8 req[1024], rsp[1024];
	u32 req_cons, req_prod, rsp_cons, rsp_prod;
	u32 server_features, connection, error;
};
enum { FEATURE_RECONNECT = 1 };

/* io/console.h: struct xencons_interface. */
struct console_page {
	u8 in[1024], out[2048];
	u32 in_cons, in_prod, out_cons, out_prod;
};

extern volatile struct store_page *store;
extern u32 store_port;

/* Notifies the XenStore daemon. */
void kick(void);
/* Waits for an event of the store's port. */
void wait_event(void);
/* Writes to the console, which dom0 logs. */
void say(const char *text);
/* Ends the domain. */
void power_off(void) __attribute__((noreturn));
/* Microseconds since an arbitrary time. */
u32 now_us(void);
/* The next pseudo-random number. */
u32 any(void);
/* A memory barrier. */
void fence(void);

u32 length(const char *words);
void copy(void *to, const void *from, u32 count);
int same(const void *a, const void *b, u32 count);
/* Appends a decimal number, or text. Returns the new end. */
char *number(char *end, u32 value);
char *text(char *end, const char *more);

/* The main function; `words` is the command line. */
void guest_main(const char *words);

#endif
