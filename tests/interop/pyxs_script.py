"""Everything that pyxs can do, against the daemon on $XENSTORED_PATH."""
import os

from pyxs import Client, PyXSError


def main():
    path = os.environ["XENSTORED_PATH"]

    def connect():
        return Client(unix_socket_path=path)

    with connect() as c:
        c.write(b"/pyxs/a", b"1")
        assert c.read(b"/pyxs/a") == b"1"
        assert c[b"/pyxs/a"] == b"1"
        c[b"/pyxs/a"] = b"2"
        assert c.read(b"/pyxs/a") == b"2"
        assert c.exists(b"/pyxs/a") and not c.exists(b"/pyxs/nope")
        assert c.read(b"/pyxs/nope", b"default") == b"default"
        try:
            c.read(b"/pyxs/nope")
            raise SystemExit("a missing node was read")
        except PyXSError:
            pass
        c.mkdir(b"/pyxs/dir/below")
        assert c.list(b"/pyxs") == [b"a", b"dir"]
        assert c.get_perms(b"/pyxs/a") == [b"n0"]
        c.set_perms(b"/pyxs/a", [b"b0", b"r7"])
        assert c.get_perms(b"/pyxs/a") == [b"b0", b"r7"]
        assert c.get_domain_path(7) == b"/local/domain/7"
        assert not c.is_domain_introduced(7)
        c.introduce_domain(7, 1, 1)
        assert c.is_domain_introduced(7)
        # release_domain and resume_domain check for a Xen host before they send a request.
        assert {top for top, _, _ in c.walk(b"/pyxs")} >= {b"/pyxs", b"/pyxs/dir"}
        c.delete(b"/pyxs/dir")
        c.delete(b"/pyxs/a")
        assert c.list(b"/pyxs") == []

    with connect() as c:
        c.transaction()
        c.write(b"/pyxs/t", b"in")
        with connect() as other:
            assert not other.exists(b"/pyxs/t")
        assert c.commit()
        assert c.read(b"/pyxs/t") == b"in"
        c.transaction()
        c.read(b"/pyxs/t")
        c.write(b"/pyxs/t", b"lost")
        with connect() as other:
            other.write(b"/pyxs/t", b"won")
        assert not c.commit()
        assert c.read(b"/pyxs/t") == b"won"
        c.transaction()
        c.write(b"/pyxs/t", b"dropped")
        c.rollback()
        assert c.read(b"/pyxs/t") == b"won"

    with connect() as c:
        monitor = c.monitor()
        monitor.watch(b"/pyxs/w", b"token")
        event = next(monitor.wait())
        assert (event.path, event.token) == (b"/pyxs/w", b"token"), event
        c.write(b"/pyxs/w/x", b"1")
        event = next(monitor.wait())
        assert (event.path, event.token) == (b"/pyxs/w/x", b"token"), event
        monitor.unwatch(b"/pyxs/w", b"token")

    print("all of pyxs works")


main()
