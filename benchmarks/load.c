/* The load generator: keeps many connections busy, each with one request under way, and counts the answers.
 *
 * It says "open" when everything is connected, begins at a line of its standard input, waits for the answers that are
 * under way when the time is over, and stays until its standard input ends: whoever measures the server in between
 * measures requests and nothing else.
 *
 *   load tcp   PORT CONNECTIONS SIZE SECONDS     echo over TCP
 *   load tls   PORT CONNECTIONS SIZE SECONDS     echo over TLS
 *   load unix  NUMBER CONNECTIONS SIZE SECONDS   echo over UNIX sockets, to the abstract name "transports_anyio NUMBER"
 *   load udp   PORT CONNECTIONS SIZE SECONDS     echo over UDP, a socket for each "connection"
 *   load conn  PORT CONNECTIONS SIZE SECONDS     connect, one echo, close
 *   load talk  PORT CONNECTIONS SIZE SECONDS     send the file LOAD_REQUEST, receive SIZE bytes; on each connection the
 *                                                file LOAD_OPENING first, if given, answered by LOAD_OPENING_SIZE bytes
 *   load mixed PORT CONNECTIONS SIZE SECONDS     echo of bulk, half over TCP and half over TLS at LOAD_TLS_PORT, and
 *                                                beside it small messages over TCP, each a millisecond after the last
 *   load serve 0    0           SIZE SECONDS     accept and close what comes; prints its port first
 *
 * Prints the number of answers and the seconds it took; then, for "mixed", which counts the bulk only, the round trips
 * of the small messages in microseconds: p50, p99 and p99.9. Has to be faster than any server that it measures: a slower
 * generator makes the server's batches, and so its cost for each request, bistable.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#endif

enum { BATCH = 256, PROBES = 4, PROBE_SIZE = 1024, MOST_ROUND_TRIPS = 1 << 20 };
static const double PROBE_PAUSE = 0.001;

struct connection {
    int fd;
    size_t size, answer_size; /* of each request and its answer */
    size_t to_send;           /* of the request under way */
    size_t to_receive;        /* of its answer */
    int waits_to_write;
    int is_probe;
#ifdef WITH_TLS
    SSL *ssl;
#endif
};

/* A connection with small messages, whose round trips are measured. */
struct probe {
    struct connection connection;
    double since; /* When the request under way began, or the last answer came. */
};

static char *payload, *answer, *opening;
static size_t size, answer_size, opening_size, opening_answer_size;
static int mode_udp, mode_conn, mode_unix, poller;
static struct sockaddr_storage server;
static socklen_t server_length;
static unsigned long answers;
static struct probe probes[PROBES];
static int probe_count;
static double *round_trips;
static size_t round_trip_count;
static int stopping; /* No more requests. */
#ifdef WITH_TLS
static SSL_CTX *context;
#endif

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Some processors copy several times slower to or from an address that is a few bytes off a page, where `malloc` puts
 * what is large. */
static char *allocate_pages(size_t count) {
    void *pages = mmap(NULL, count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) fail("mmap");
    return pages;
}

static char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    char *content = allocate_pages(1 << 18);
    *length = fread(content, 1, 1 << 18, file);
    fclose(file);
    return content;
}

static void set_server(const char *port) {
    struct sockaddr_in *address = (struct sockaddr_in *)&server;
    address->sin_family = AF_INET;
    address->sin_port = htons(atoi(port));
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server_length = sizeof *address;
}

static void set_unix_server(const char *number) {
    struct sockaddr_un *address = (struct sockaddr_un *)&server;
    address->sun_family = AF_UNIX;
    /* An abstract name begins with a null byte, and does not end with one. */
    int length = snprintf(address->sun_path + 1, sizeof address->sun_path - 1, "transports_anyio %s", number);
    server_length = offsetof(struct sockaddr_un, sun_path) + 1 + length;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void watch(struct connection *c, int write, int operation) {
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = c};
    c->waits_to_write = write;
    if (epoll_ctl(poller, operation, c->fd, &event)) fail("epoll_ctl");
}

static void open_connection(struct connection *c) {
    int one = 1;
    c->size = size;
    c->answer_size = answer_size;
    c->fd = socket(server.ss_family, mode_udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (c->fd < 0) fail("socket");
    if (!mode_udp && !mode_unix) setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (mode_conn) {
        /* A reset instead of TIME_WAIT: the ports would run out. */
        struct linger linger = {1, 0};
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    if (connect(c->fd, (struct sockaddr *)&server, server_length)) fail("connect");
    if (opening) {
        if (send(c->fd, opening, opening_size, MSG_NOSIGNAL) != (long)opening_size) fail("send");
        if (recv(c->fd, answer, opening_answer_size, MSG_WAITALL) != (long)opening_answer_size) fail("recv");
    }
#ifdef WITH_TLS
    if (context) {
        c->ssl = SSL_new(context);
        SSL_set_fd(c->ssl, c->fd);
        if (SSL_connect(c->ssl) != 1) fail("SSL_connect");
    }
#endif
    fcntl(c->fd, F_SETFL, fcntl(c->fd, F_GETFL) | O_NONBLOCK);
    watch(c, 0, EPOLL_CTL_ADD);
}

static long put(struct connection *c, const char *data, size_t count) {
#ifdef WITH_TLS
    if (c->ssl) {
        int sent = SSL_write(c->ssl, data, count);
        if (sent > 0) return sent;
        errno = EAGAIN;
        return -1;
    }
#endif
    return send(c->fd, data, count, MSG_NOSIGNAL);
}

static long get(struct connection *c) {
#ifdef WITH_TLS
    if (c->ssl) {
        int received = SSL_read(c->ssl, answer, 1 << 18);
        if (received > 0) return received;
        if (SSL_get_error(c->ssl, received) == SSL_ERROR_ZERO_RETURN) return 0;
        errno = EAGAIN;
        return -1;
    }
#endif
    return recv(c->fd, answer, 1 << 18, 0);
}

static void request(struct connection *c) {
    while (c->to_send) {
        long sent = put(c, payload + c->size - c->to_send, c->to_send);
        if (sent < 0) {
            if (errno != EAGAIN) fail("send");
            break;
        }
        c->to_send -= sent;
    }
    if (!!c->to_send != c->waits_to_write) watch(c, !!c->to_send, EPOLL_CTL_MOD);
}

static void start(struct connection *c) {
    c->to_send = c->size;
    c->to_receive = c->answer_size;
    request(c);
}

static void ready(struct connection *c, int events) {
    if (events & EPOLLOUT) request(c);
    if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    for (;;) {
        long received = get(c);
        if (received < 0 && errno == EAGAIN) return;
        if (received < 0) fail("recv");
        if (received == 0 && !mode_udp) {
            fprintf(stderr, "the server closed a connection\n");
            exit(1);
        }
        c->to_receive -= (size_t)received < c->to_receive ? (size_t)received : c->to_receive;
        if (!c->to_receive) {
            answers++;
            if (mode_conn) {
                close(c->fd);
                if (!stopping) open_connection(c);
            }
            if (!stopping) start(c);
            return; /* Everybody in turn. */
        }
    }
}

static void probe_all(void) {
    for (int i = 0; i < probe_count; i++) {
        struct probe *p = &probes[i];
        struct connection *c = &p->connection;
        if (!c->to_receive) {
            if (!stopping && now() - p->since >= PROBE_PAUSE) {
                p->since = now();
                start(c);
            }
            continue;
        }
        if (c->to_send) request(c);
        long received = get(c);
        if (received < 0 && errno == EAGAIN) continue;
        if (received <= 0) fail("recv");
        c->to_receive -= received;
        if (c->to_receive) continue;
        double then = p->since;
        p->since = now();
        if (round_trip_count < MOST_ROUND_TRIPS) round_trips[round_trip_count++] = p->since - then;
    }
}

static void open_probes(void) {
    round_trips = malloc(MOST_ROUND_TRIPS * sizeof *round_trips);
    size_t bulk = size;
    size = answer_size = PROBE_SIZE;
    for (; probe_count < PROBES; probe_count++) {
        probes[probe_count].connection.is_probe = 1;
        open_connection(&probes[probe_count].connection);
    }
    size = answer_size = bulk;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(double share) {
    return round_trip_count ? round_trips[(size_t)(share * (round_trip_count - 1) + 0.5)] * 1e6 : 0;
}

static void serve(double seconds) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    struct timeval timeout = {.tv_sec = (long)seconds, .tv_usec = (long)((seconds - (long)seconds) * 1e6)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) break;
        struct linger linger = {1, 0};
        /* The peer closes first; a reset leaves no TIME_WAIT behind. */
        while (recv(fd, answer, 1 << 18, 0) > 0) {}
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        close(fd);
        answers++;
    }
}

int main(int argc, char **argv) {
    struct epoll_event events[BATCH];
    struct rlimit limit;
    if (argc != 6) {
        fprintf(stderr, "usage: load MODE PORT CONNECTIONS SIZE SECONDS\n");
        return 2;
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    mode_udp = !strcmp(argv[1], "udp");
    mode_conn = !strcmp(argv[1], "conn");
    mode_unix = !strcmp(argv[1], "unix");
    if (mode_unix)
        set_unix_server(argv[2]);
    else
        set_server(argv[2]);
    int count = atoi(argv[3]);
    size = answer_size = atol(argv[4]);
    double seconds = atof(argv[5]);
    payload = allocate_pages(size + 1);
    if (!strcmp(argv[1], "talk")) {
        payload = read_file(getenv("LOAD_REQUEST"), &size);
        if (getenv("LOAD_OPENING")) {
            opening = read_file(getenv("LOAD_OPENING"), &opening_size);
            opening_answer_size = atol(getenv("LOAD_OPENING_SIZE"));
        }
    }
    answer = allocate_pages(1 << 18);
    if (!strcmp(argv[1], "serve")) {
        serve(seconds);
        printf("%lu\n", answers);
        return 0;
    }
    poller = epoll_create1(0);
    struct connection *connections = calloc(count, sizeof *connections);
    int mixed = !strcmp(argv[1], "mixed"), opened = 0;
    if (mixed) {
        open_probes();
        while (opened < count / 2) open_connection(&connections[opened++]);
        set_server(getenv("LOAD_TLS_PORT"));
    }
#ifdef WITH_TLS
    if (!strcmp(argv[1], "tls") || mixed) {
        context = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL);
        SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        signal(SIGPIPE, SIG_IGN);
    }
#else
    if (!strcmp(argv[1], "tls") || mixed) {
        fprintf(stderr, "compiled without OpenSSL\n");
        return 3;
    }
#endif
    while (opened < count) open_connection(&connections[opened++]);
    /* Connections that do nothing, beside those that do. */
    const char *idle = getenv("LOAD_IDLE");
    int idle_count = idle ? atoi(idle) : 0;
    struct connection *idlers = calloc(idle_count + 1, sizeof *idlers);
    for (int i = 0; i < idle_count; i++) open_connection(&idlers[i]);
    printf("open\n");
    fflush(stdout);
    getchar();
    double begin = now(), end = begin + seconds, last = begin;
    for (int i = 0; i < count; i++) start(&connections[i]);
    unsigned long all = 0;
    while (!stopping || (answers < all && now() - last < 0.2)) {
        int n = epoll_wait(poller, events, BATCH, mixed ? 1 : stopping ? 10 : 100);
        if (n > 0) last = now();
        probe_all();
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c->is_probe) ready(c, events[i].events);
            probe_all(); /* Between the bulk, too: it must not delay what is measured. */
        }
        if (!stopping && now() >= end) {
            stopping = 1;
            all = answers + count;
        }
        if (mode_udp && !stopping && n == 0 && now() - last > 0.2)
            /* A datagram was dropped: ask again. */
            for (int i = 0; i < count; i++) start(&connections[i]);
    }
    printf("%lu %.6f", answers, now() - begin);
    if (mixed) {
        qsort(round_trips, round_trip_count, sizeof *round_trips, ascending);
        printf(" %.1f %.1f %.1f", percentile(0.5), percentile(0.99), percentile(0.999));
    }
    printf("\n");
    fflush(stdout);
    while (getchar() != EOF) continue;
    return 0;
}
