"""GGUF's IQ kinds of 1 to 3 bits: a code names a point of a codebook, eight or four weights at once.

A point's coordinates are sizes of a small table, and bits beside the code give the signs. With the table's places as
codes of four bits, sign in bit 3, a point of eight weights is one 32-bit word of a `Packed`'s data, and so are eight
signs: unpacking is two look-ups and one `or`. Sources: ggml's block layouts (ggml-common.h), the codebooks as the gguf
package has them, printed by scripts/gguf_codebooks.py.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.checkpoints.formats.gguf_bits import BlockParts, fields, flags, half, words

_LATTICES = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1"), (3, 8)),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), (8, 4)),
}
"""Sizes that a coordinate can have, and coordinates of a point, in the order of `_POINTS`."""
_POINTS = (
    "c-nPWO^h5z6@FDzp_+EEs+VrX;#AvShfX`PjBkWXwKXFd`_dCli@Q%Ipa^m1r`_y^ac_`f3j~5oyRnmTJ92^#$c!aN$|*z~K-_Y$"
    "z=sI04@kLyj6`@<)jd74IIWr8o_h7(``)YXy{gK?AeZAb1s04!0szwxfClphkV&2TKmw*S97i$7Zw5fXOi6J(2<$}nv04(kCty<I"
    "H0A>%_@a##KEzFwOruGsCA+V6;T}$m$l&n%A*-%C)8;4P&XQBg`gx#Jl<Iyq>vTGq`8Wg&HXjEs!)!>2A%k@4V=&k|{94*+(g0mW"
    "N?-^XBpHlL(kI1!<=A3m#Hz3j-2tN}YZlpR4wG!atk=c%N$oV!iS#hdg7k+dgJ;IR7Q^AkWV2ferdNt91C};=2-14AIVT%ot$P^4"
    "BeGA!I&SE5sGq5|@yO4St&kkf<}==(`LNHQmgo62pQPc0%<?>&q!QUWn_{gnAOtca3Jrr$ghXb{CQ)+7zMT7kD~OKc(ja8S5oVT8"
    "QA_s*QItXE_vthSCpKp~?c=g*;$At2uBQAA@VZ0o3<Arf@!C}#aTCX>WnN!2PDuLP$&^?xvbSmLfY{`ZUC1`BE@T*Ecq!=(Vxnw4"
    "5fr%v*CtU~4n;#q=QXwd2i|n)wIMU$o4f{X(<@DSQa2#i8VbW~Xx;Hc>J5_UE{D><$~GD0NJI1*7hGA(!@L8sk!aSpBOP)QGGjLj"
    "NmsjIqcB-cgPAQFy~a;H6g$o~$u^z!Fk>ZSE*r#^yWFHV8X22rAlE?#hbx3_c9x<4BDdIDTe7*-LGOjZW_Q_4rg1*$mY_q;hrbBd"
    "6-^#;KQ|oD10Dv*@hoTH`}l8y6T;bKn&o+bA47i>O#{o;FgIFA6U}orMv+<ZKytThV9`v`aySjJ9*v7UfGkK;#=%l@Fla>9V89(E"
    "u^y+)h%jO&lCIZwOrK4|Y04S#VU}T8IxPuPQ?DGx7{!J`zu&s7vX3yN%}%%~8(X3H#}ti;ISj@o8@xl9hRlR)aOJsc2H-?l+9N~*"
    "GH@a`^a%}_?3V@&hE@yyFXX^>f}qn{8H5hJ4H-qY^9}}Gx3K)0gd7oSX*q6lC=Co|IYXxF2Bnp)szcgrxTYgFXykeV_6a|j`Pge<"
    ";=p4w@WW0ESK05nOCK^ZqHNWnjL4WFtNp}U=7uYiTy|P^QDonE9Alr6Ltn1KHqDz1XAJ)k^O3zX*>CK!uTvek);R49lCI+(+Fx`J"
    "bgc<!5|A!U`H5h!re~*O^0me5s%pL>5*6%aL8-=*6Ctl@spiK(l=T;qdVat4-fWLR1YY|_SqqI?+w&p|P`x@WepQPi!I5B3ojaS0"
    "33=&*T2(JVva@I#@#tM4;uz3Z+{S8ADDOAo56gx6=+2eqPW$o?o*XRimq+hK%a8tg^csyIQj2Qol~h1-{%_4UB6YHX%ldL##Udhz"
    "Ff7$*vOU|Y1wFoaS?!i;hA<i>evt(<5%(5lQJ<qql+C4v#<vr(hwrDw1e*vVtl{hwo6(CURAnNrpAI;N96Ruosx|?&^}Fg$yjWgu"
    "7vF=@6Eu$KE|hSts1M#t+7HzJGCKJ9?fw1N7T56i_xG#ubBQ{)tK%vWt@`j!P1L;m>-rxH3KWvX98^*7H%+{(i}H-Od~k31-zQCd"
    "vJsURA2e|N41MnDjf02(Jh?davj;zV^7LOne*cpnE+2mTKVSXq{TH5YJ^p(Y$@am~-B#RP94YU7w%mFAlY(7*>C&eQ@5V{Mkj0~R"
    "3uu{mZ>c|)SKcgRXyA?F%TNjd->usAK7H#!RewZ_@BH%ApYJ}Fr99O>jKja&WZ;=RC_%2Pvi<rpI<s4kiepeU7wKi}9+<IrO1sLf"
    "irb%hTXvOsEevglqP1=!n1g7<tJQ1w+O`1Ym5)A*w#C?JjVcu)qh9w!n<NEzMr(Tk*5D&GFTG>91Z~q+@9k4BK^JAwda;P%)|^K5"
    "gCp@hQ7tdr#gK3O`%bG~i7)-WKK)7IQDnla7m-M`ZBMob&8@l-LaMropgihU*|QYA^+h<}QgIXHm&V;HbEI_n&Zi2i0DXB&b<j{K"
    "&yC{80r(dth8qiN5zcqSJodD}5e%6cgCwjt#WIRL9&w7>dq{bO)KDc?uF?b)vVgdRRdZ6d+@^pc3Lf{u!t{6Qb})}qdphAjsHxXz"
    "Rj>A7M%7wPn_=!vjDJY1-kk7~7X&9!*ExLaPZ(bXdK<cer!5em+(Y}y`ZFEJGs*@jHCnD)6gZL^@XB@y4NfHNp`d^o7kurcLNJ^Z"
    "z4g<L6WPO9oeUHojx*GrsC2Jj&-SeI0K^(+Zrb|kygweAu59d6_bpauk#zm|q=q)wfp_K>s|~a}|C=z)iD(6v+L?Sv-Nw=G?Qb0y"
    "H$8ss`Quk22@(74HzWUs2O|;j^O6@4nQyTXH3zJTXg~|?p*hTMh`-J1Jb#<N0vTl&d^$o3q~wOrMvAa&qteHTBo4qE<2)<1kgwXE"
    "0ePZ~{B~aPgcmRJD?3{Z<=4QwOy{t5f(9PLJ*I@w4i4`~$_gTY>=`4dsi-Ex+zeZm{G1A!NY5Oc#)KhMV)#>$3UeUNqE)<BQ?3{u"
    "eT5~V@ehvRKD)}0d1TjP+XBhzZBs!CymMedxD%N)^rp4dVkYtK9<U8W;1Kf}T*VzeVV1^>P?4I<?;`6Y_UtXZ!@C=wHcnT&S<vtF"
    "i5WE~)XV)POftm?k+fSVvyco%-Tg!L3)tDZid(k1Cotq_jK8;1jD}htI|fH2`YST)FP(Iq1pfoYK<We"
)
"""Which points of each lattice its codebook holds, in ascending order, the first coordinate the lowest digit: one bit a
point, compressed."""
_IQ1 = ((9, 0, 2), (10, 8, 1))
"""The codes of -1, 0 and 1 with an eighth added, and with an eighth taken away."""


def _iq2_xxs(block: Tensor) -> BlockParts:
    group = block[..., 2:].unflatten(-1, (8, 8))
    rest = words(group[..., 4:], torch.int32)
    data = _at(_points("IQ2_XXS"), group[..., :4]) | _sevens(rest)
    return _parts("iq2", data.flatten(-2), half(block, 0) * (0.5 + (rest[..., 0] >> 28 & 15)) * 0.25)


def _iq2_xs(block: Tensor) -> BlockParts:
    code = words(block[..., 2:66], torch.int16).int()
    data = _at(_points("IQ2_XS"), code & 511) | _at(_even_signs(), code >> 9 & 127)
    return _parts("iq2", data, half(block, 0) * (0.5 + fields(block[..., 66:], 1, 4)) * 0.25)


def _iq2_s(block: Tensor) -> BlockParts:
    code = block[..., 2:34] | fields(block[..., 66:74], 1, 2).int() << 8
    data = _at(_points("IQ2_S"), code) | _at(_signs(), block[..., 34:66])
    return _parts("iq2", data, half(block, 0) * (0.5 + fields(block[..., 74:], 1, 4)) * 0.25)


def _iq3_xxs(block: Tensor) -> BlockParts:
    rest = words(block[..., 66:], torch.int32)[..., None]
    data = _at(_points("IQ3_XXS"), block[..., 2:66]) | _sevens(rest).flatten(-2).view(torch.int16)
    return _parts("iq3", data, half(block, 0) * (0.5 + (rest[..., 0] >> 28 & 15)) * 0.5)


def _iq3_s(block: Tensor) -> BlockParts:
    code = block[..., 2:66] | flags(block[..., 66:74]).int() << 8
    data = _at(_points("IQ3_S"), code) | _at(_signs(), block[..., 74:106]).view(torch.int16)
    return _parts("iq3s", data, half(block, 0) * (1 + 2 * fields(block[..., 106:], 1, 4)))


def _iq1_s(block: Tensor) -> BlockParts:
    high = words(block[..., 34:], torch.int16).int()
    threes = (high[..., None] >> torch.tensor([0, 3, 6, 9]) & 7 | (high[..., None] >> 15 & 1) << 3).flatten(-2)
    data = _at(_points("IQ1"), block[..., 2:34] | threes << 8)
    return _parts("iq1", data, half(block, 0) * (2 * (high >> 12 & 7) + 1))


def _iq1_m(block: Tensor) -> BlockParts:
    """A block's float16 is cut in four: each takes the high bits of one of the words that hold the scales."""
    small = words(block[..., 48:], torch.int16).int()
    whole = (small >> 12 & 15) << torch.tensor([0, 4, 8, 12])
    d = whole.sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    threes = (small[..., None] >> torch.tensor([0, 3, 6, 9]) & 7).flatten(-2)
    data = _at(_points("IQ1"), block[..., :32] | fields(block[..., 32:48], 1, 4).int() << 8)
    return _parts("iq1", data, d * (2 * threes + 1))


DECODERS: dict[str, Callable[[Tensor], BlockParts]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
"""By the name of the kind: blocks [.., n, bytes] to what they say."""


def _parts(kind: str, data: Tensor, scale: Tensor) -> BlockParts:
    """Words of codes [.., n, words of a block of 256], and the scales of each block."""
    return BlockParts(kind, words(data, torch.uint8).flatten(-2), scale.flatten(-2), 256 // scale.shape[-1])


def _at(table: Tensor, index: Tensor) -> Tensor:
    """The words of a table at these places, in their shape."""
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def _sevens(word: Tensor) -> Tensor:
    """The signs of four times eight weights in a word [.., 1], each eight said by seven bits."""
    return _at(_even_signs(), word >> torch.tensor([0, 7, 14, 21]) & 127)


@cache
def _signs() -> Tensor:
    """The signs that each byte says, int32 [256]: bit 3 of each code of a word."""
    return _words(8 * _bits(np.arange(256)))


@cache
def _even_signs() -> Tensor:
    """The same of seven bits, [128]: the eighth sign makes the number of minuses even."""
    seven = np.arange(128)
    return _signs()[torch.from_numpy(seven | _bits(seven).sum(axis=1) % 2 << 7)]


def _bits(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return numbers[:, None] >> np.arange(8) & 1


@cache
def _points(name: str) -> Tensor:
    """The points of a codebook as words of codes: int32 of eight, or int16 of four.

    IQ1's are there twice: with the eighth added, then with it taken away."""
    start = 0
    packed = zlib.decompress(base64.b85decode(_POINTS))
    for book, (sizes, count) in _LATTICES.items():
        end = start + -(-(sizes**count) // 8)
        if book == name:
            break
        start = end
    is_member = np.unpackbits(np.frombuffer(packed[start:end], np.uint8), bitorder="little")
    digits = np.flatnonzero(is_member)[:, None] // sizes ** np.arange(count) % sizes
    return _words(np.concatenate([np.array(codes)[digits] for codes in _IQ1]) if name == "IQ1" else digits)


def _words(codes: NDArray[np.int64]) -> Tensor:
    """Rows of four-bit codes, one word each."""
    count = codes.shape[1]
    whole = (codes << 4 * np.arange(count)).sum(axis=1)
    return torch.from_numpy(
        whole.astype(np.uint32 if count == 8 else np.uint16).view(np.int32 if count == 8 else np.int16)
    )
