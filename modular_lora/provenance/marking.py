"""How a file says that a model made its image: IPTC's digital source type in an XMP packet, and in files that have no
other place for it the attestation beside it.

The property is `DigitalSourceType` of the IPTC Photo Metadata Standard (extension schema), its values are IPTC's
NewsCodes (http://cv.iptc.org/newscodes/digitalsourcetype/).
"""

from __future__ import annotations

import codecs
import re
from xml.sax.saxutils import escape, unescape

CODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = f"{CODES}trainedAlgorithmicMedia"
COMPOSITE = f"{CODES}compositeWithTrainedAlgorithmicMedia"
KEYWORD = "XML:com.adobe.xmp"  # of a PNG's text that holds an XMP packet
SOURCE_TYPE = "digital_source_type"  # a record's own field
_OURS = "https://github.com/modularloraguard/modular-lora-guard/xmp/1.0/"
_ATTESTATION = re.compile(rb"<guard:attestation>(.*?)</guard:attestation>", re.DOTALL)
_BOM = codecs.BOM_UTF8.decode()
_ID = "W5M0MpCehiHzreSzNTczkc9d"  # that of every packet, by the XMP specification, part 1


def packet(source: str, attestation: str = "") -> bytes:
    """An XMP packet.

    Args:
        source: IPTC's code, "": it says nothing of that.
        attestation: JSON text of a record; "": none.
    """
    iptc = f"<Iptc4xmpExt:DigitalSourceType>{escape(source)}</Iptc4xmpExt:DigitalSourceType>" if source else ""
    ours = f"<guard:attestation>{escape(attestation)}</guard:attestation>" if attestation else ""
    return (
        f'<?xpacket begin="{_BOM}" id="{_ID}"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:guard="{_OURS}">'
        f'{iptc}{ours}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def attestation_in(found: bytes) -> str:
    """The attestation's text in a packet, "" where it holds none; whether it is whole, `packet` of it tells."""
    match = _ATTESTATION.search(found)
    return unescape(match[1].decode("utf-8", "replace")) if match else ""
