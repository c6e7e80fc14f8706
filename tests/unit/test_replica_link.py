import os

import pytest

from snowdrop.domain.errors import TimedOutError
from snowdrop.replica import link as link_module
from snowdrop.replica.link import AgentLink
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.replica import FROM_REPLICA, TO_REPLICA, ModelHandle, ModelRenewed, RenewModel

HANDLE = ModelHandle(name="m", param="m", directory="/m")


def test_a_renewal_that_comes_too_late_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "RENEW_S_MAX", 0.01)
    ours, theirs = packet_pair()
    ours.settimeout(10)
    link = AgentLink(theirs, PacketChannel(theirs, TO_REPLICA), on_gone=lambda: None)
    agent = PacketChannel(ours, FROM_REPLICA)
    with pytest.raises(TimedOutError):
        link.renew_model("m")
    assert agent.receive_blocking() == (RenewModel(model="m"), ())
    gone, kept = os.pipe()
    agent.send_blocking(ModelRenewed(model="m", handle=HANDLE), (kept,))
    os.close(kept)
    ours.shutdown(1)
    link._read()
    assert os.read(gone, 1) == b"", "no end for writing is open any more"
    for fd in (gone, ours.detach(), theirs.detach()):
        os.close(fd)
